"""Made-up documents, all of whose words are single pieces of the project's tokenizer."""

import numpy as np

WORDS = "the lamp chair table was very good bad nurse pilot found lost a book near this judge".split()


def document(seed: int, num_lines: int = 30) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, 12)) for _ in range(num_lines)]
