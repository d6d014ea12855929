"""Make the least used of a T5's attention heads look for the same piece elsewhere in the input, to pre-train from.

    python jobs/make_matching_heads.py RECIPE.yaml [more.yaml …] [key.sub=value …] --out DIR

The recipe is one of jobs/pretrain.py. Its backbone, trained or not, is saved with the new heads, measured on its
training texts. Then `jobs/pretrain.py RECIPE.yaml backbone.init=pretrained backbone.name=DIR` trains from there, which
trained weights need too: they had other heads. How and why: platform/polyprompt/matching_heads.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import make_embeddings

from polyprompt.config import RunConfig

#: Windows of text to measure keys on, and their tokens.
WINDOWS, TOKENS = 64, 64


def make(config: RunConfig, out: Path) -> None:
    """Measure, and write the backbone with the new heads."""
    import numpy as np
    import torch

    from polyprompt import matching_heads

    model, texts = make_embeddings.read(config)
    tokens = np.concatenate([text[: WINDOWS * TOKENS // len(texts) + 1] for text in texts]).astype(np.int64)
    windows = torch.from_numpy(tokens[: len(tokens) // TOKENS * TOKENS]).reshape(-1, TOKENS)
    heads = matching_heads.start_from(model.backbone, windows, config.train.seed)
    which = " and ".join(str(head) for head in heads)
    make_embeddings.save(model, out, f"heads {which} of each encoder layer look for the same piece")


if __name__ == "__main__":
    sys.exit(make_embeddings.main(__doc__, make))
