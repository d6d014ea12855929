"""Embeddings from counts: which pieces stand near which in a text, as mutual information, factorised.

A table that starts from them has like pieces beside like ones ("dreadful" beside "terrible") before the first step.
A small network from random embeddings finds that out late or never: each row moves only where its piece is read.

Source: Levy & Goldberg 2014, Neural word embedding as implicit matrix factorization; Levy, Goldberg & Dagan 2015,
Improving distributional similarity with lessons learned from word embeddings: positive pointwise mutual information
(section 2.1), contexts smoothed by 0.75 (section 3.2), U·Σ^½ of its singular value decomposition (section 3.3). Near
pairs count more, by 1/distance as in GloVe (Pennington et al. 2014, section 4.2). We count pieces, not words.

V: pieces of the vocabulary, H: size of an embedding.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from polyprompt.errors import DataError

WINDOW = 5
SMOOTHING = 0.75
#: The part of an embedding's variance that is from counts, of a piece that was seen often. The rest stays as it was
#: drawn: it tells pieces apart that stand in the same places (the people and things of a made text).
COUNTED = 0.6
#: A piece that was seen this often has half of that part.
HALF_SEEN = 20
#: Tokens that are counted at once: pairs are summed up before they take much memory.
CHUNK = 1_000_000

Floats = npt.NDArray[np.float64]


def counts(texts: Iterable[npt.NDArray[Any]], num_pieces: int) -> sparse.csr_matrix:
    """Return how often two pieces stand at most WINDOW tokens apart, each time by 1/distance: symmetric, V × V.

    texts: ids of tokens, one row a text; nothing is counted across texts.
    """
    total = sparse.csr_matrix((num_pieces, num_pieces))
    for text in texts:
        for start in range(0, len(text), CHUNK):
            for distance in range(1, WINDOW + 1):
                right = np.asarray(text[start + distance : start + distance + CHUNK], dtype=np.int32)
                left = np.asarray(text[start : start + len(right)], dtype=np.int32)
                share = np.full(len(right), 1 / distance)
                total = total + sparse.coo_matrix((share, (left, right)), shape=total.shape).tocsr()
    return (total + total.T).tocsr()


def mutual_information(counted: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return log p(a, b) / (p(a) p'(b)) where it is positive, V × V; p' of a context is smoothed."""
    pieces = np.asarray(counted.sum(axis=1)).ravel()
    contexts = np.asarray(counted.sum(axis=0)).ravel() ** SMOOTHING
    contexts /= contexts.sum()
    pairs = counted.tocoo()
    pairs.data = np.maximum(np.log(pairs.data / (pieces[pairs.row] * contexts[pairs.col])), 0)
    pairs.eliminate_zeros()
    return pairs.tocsr()


def vectors(counted: sparse.csr_matrix, size: int, seed: int) -> Floats:
    """Return the pieces' vectors V × H, centred on the pieces that were seen and then of length √H; 0 where not seen.

    Raises DataError where fewer pieces than H were seen.
    """
    seen = np.asarray(counted.sum(axis=1)).ravel() > 0
    if seen.sum() <= size:
        raise DataError(
            f"the text has {seen.sum()} different pieces, which make no embeddings of size {size}; give more text"
        )
    left, values, _ = randomized_svd(mutual_information(counted), size, n_iter=4, random_state=seed)
    found = left * np.sqrt(values)
    found -= found[seen].mean(axis=0)
    found *= np.sqrt(size) / np.linalg.norm(found, axis=1, keepdims=True).clip(min=1e-12)
    found[~seen] = 0
    return np.asarray(found)


@torch.no_grad()
def start_from(table_VH: Tensor, texts: Iterable[npt.NDArray[Any]], seed: int) -> int:
    """Give an embedding table what the texts tell, in place; return how many pieces they told of.

    A piece seen n times becomes mean + √(1-r) · (own - mean) + √r · counted with r = COUNTED · n/(n + HALF_SEEN): a
    rare piece's neighbours are chance. The table keeps its mean, which a trained network expects, and its spread;
    pieces that were not seen keep their embedding.
    """
    texts = list(texts)
    num_pieces, size = table_VH.shape
    found = vectors(counts(texts, num_pieces), size, seed)
    told = found.any(axis=1)
    times = told * sum(np.bincount(text, minlength=num_pieces) for text in texts)
    share = torch.from_numpy(COUNTED * times / (times + HALF_SEEN))[:, None]
    mean = table_VH.double().mean(dim=0)
    own = table_VH.double() - mean
    mixed = mean + (1 - share).sqrt() * own + share.sqrt() * own.square().mean().sqrt() * torch.from_numpy(found)
    table_VH.copy_(torch.where(share > 0, mixed, table_VH.double()))
    return int(told.sum())
