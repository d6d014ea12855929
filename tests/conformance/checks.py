"""The checks. Each takes a subject and raises Failed where its claim does not hold, NotApplicable where it has none.

Any other exception of the library counts as a failure too.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_batch import NUM_TASKS, VOCABULARY

from conformance.driver import Batch, Failed, Model, NotApplicable, Subject, batch, same, same_text

#: Agreement of sums taken in another order.
CLOSE = 1e-5
BF16 = 0.03
CHOICES = [[[5 + i, 1], [9, 10 + i, 11, 1], [7, 1]][: 1 + i % 3] for i in range(6)]
SEEDS = [11, 12, 13, 14, 15, 16]


def length_0(subject: Subject) -> None:
    """A prompt of length 0 is the plain backbone, bit for bit."""
    for attention in ("sdpa", "eager"):
        got = subject.build(empty=True, attention=attention).nll(batch())
        same(got, subject.plain(attention).nll(batch()), f"loss with {attention} attention")


def gradient(subject: Subject) -> None:
    """Every trained parameter gets gradient, and no other."""
    model = subject.build()
    model.loss(batch(12)).backward()
    for name, weight in model.trained().items():
        if weight.grad is None or not weight.grad.any():
            raise Failed(f"no gradient for {name}")
        if not weight.grad.isfinite().all():
            raise Failed(f"the gradient is not finite for {name}")
    for name, weight in model.vectors().items():
        assert weight.grad is not None
        unused = (~weight.grad.flatten(0, -2).any(dim=1)).sum().item()
        if unused:
            raise Failed(f"no gradient for {unused} of {weight.grad.flatten(0, -2).shape[0]} vectors of {name}")
    for name, weight in model.frozen().items():
        if weight.grad is not None:
            raise Failed(f"gradient for the frozen {name}")


def positions(subject: Subject) -> None:
    """Prompts leave the position bias of real tokens as it is: first-layer attention among them keeps its ratios."""
    expected, got = subject.plain("eager").attention(batch()), subject.build(attention="eager").attention(batch())
    for stack, rows in expected.items():
        for row, (plain, made) in enumerate(zip(rows, got[stack], strict=True)):
            shares = [weights / weights.sum(dim=-1, keepdim=True) for weights in (made, plain)]
            same(shares[0], shares[1], f"{stack} attention of row {row}", tolerance=1e-4)


def padding(subject: Subject) -> None:
    """A row's loss depends neither on padding nor on its batch-mates."""
    model, rows = subject.build(), batch()
    expected = model.nll(rows)
    # The padded ids are real words: only the mask may tell.
    wide = rows._replace(
        input_ids_BT=torch.cat([rows.input_ids_BT, torch.full((6, 5), 17)], dim=1),
        mask_BT=torch.cat([rows.mask_BT, torch.zeros(6, 5, dtype=torch.long)], dim=1),
        labels_BS=torch.cat([rows.labels_BS, torch.full((6, 2), -100)], dim=1),
    )
    same(model.nll(wide), expected, "loss with more padding", tolerance=CLOSE)
    for row in range(6):
        words, labels = rows.words(row), rows.labels_BS[row]
        alone = Batch(words[None], torch.ones_like(words)[None], labels[labels != -100][None], rows.task_B[[row]])
        same(model.nll(alone), expected[[row]], f"loss of row {row} alone", tolerance=CLOSE)


def cached_decoding(subject: Subject) -> None:
    """Step-by-step cached decoding is full decoding, and takes the pieces that the loss finds likeliest."""
    model, rows = subject.build(), batch()
    rows = rows._replace(task_B=torch.ones_like(rows.task_B))
    for num_beams in (1, 3):
        cached, full = (model.generate(rows, num_beams=num_beams, use_cache=cache) for cache in (True, False))
        same_text(cached, full, f"{num_beams} beams, cached and not")
    written = model.generate(rows)
    for row in (0, 1, 5):
        one = rows.rows([row] * VOCABULARY)
        for step in range(3):
            before = written[row, :step].expand(VOCABULARY, -1)
            labels = torch.cat([before, torch.arange(VOCABULARY)[:, None]], dim=1)
            nll = model.nll(one._replace(labels_BS=labels))
            worse = nll[written[row, step]] - nll.min()
            if worse > 1e-3:
                raise Failed(
                    f"row {row}, step {step}: greedy search takes a piece {worse:.3f} nats below the likeliest"
                )
            if written[row, step] == 1:
                break


def mixed_loss(subject: Subject) -> None:
    """A mixed-task batch has the losses and choice scores of its single-task batches."""
    model, rows = _mixing(subject), batch()
    nll, scores = model.nll(rows), model.scores(rows, CHOICES)
    for task, which in _tasks(rows):
        same(model.nll(rows.rows(which)), nll[which], f"loss of task {task}", tolerance=CLOSE)
        own = model.scores(rows.rows(which), [CHOICES[i] for i in which])
        for i, got in zip(which, own, strict=True):
            same(torch.tensor(got), torch.tensor(scores[i]), f"choice scores of row {i}", tolerance=CLOSE)


def mixed_greedy(subject: Subject) -> None:
    """Greedy search on mixed-task rows is that of single-task runs."""
    _mixed_text(_mixing(subject), batch(), num_beams=1)


def mixed_beams(subject: Subject) -> None:
    """Beam search on mixed-task rows is that of single-task runs."""
    _mixed_text(_mixing(subject), batch(), num_beams=3)


def mixed_sampling(subject: Subject) -> None:
    """Sampling on mixed-task rows is that of single-task runs under each row's seed."""
    model, rows = _mixing(subject), batch()
    drawn = model.generate(rows, seeds=SEEDS)
    for task, which in _tasks(rows):
        own = model.generate(rows.rows(which), seeds=[SEEDS[i] for i in which])
        same_text(drawn[which], own, f"task {task}")
    again = model.generate(rows, seeds=[seed + 100 for seed in SEEDS])
    if again.shape == drawn.shape and torch.equal(again, drawn):
        raise Failed("other seeds draw the same text")


def unequal_lengths(subject: Subject) -> None:
    """Rows with prompts of different lengths are as each of them alone: loss, scores and all ways to generate."""
    if not subject.length:
        raise NotApplicable("no prompt tokens")
    model = subject.build()
    rows = batch(4)._replace(lengths_B=torch.tensor([0, 1, subject.length, 2]))
    nll, scores = model.nll(rows), model.scores(rows, CHOICES[:4])
    made = {num_beams: model.generate(rows, num_beams=num_beams) for num_beams in (1, 3)}
    drawn = model.generate(rows, seeds=SEEDS[:4])
    for row in range(4):
        one = rows.rows([row])
        same(model.nll(one), nll[[row]], f"loss of row {row}", tolerance=CLOSE)
        (own,) = model.scores(one, [CHOICES[row]])
        same(torch.tensor(own), torch.tensor(scores[row]), f"choice scores of row {row}", tolerance=CLOSE)
        for num_beams, text in made.items():
            same_text(text[[row]], model.generate(one, num_beams=num_beams), f"{num_beams} beams, row {row}")
        same_text(drawn[[row]], model.generate(one, seeds=[SEEDS[row]]), f"sampling, row {row}")
    if torch.allclose(nll, model.nll(rows._replace(lengths_B=None)), rtol=CLOSE, atol=CLOSE):
        raise Failed("shorter prompts change nothing")


def gradient_checkpointing(subject: Subject) -> None:
    """Gradient checkpointing changes neither loss nor gradients, dropout on."""
    (loss, grads), (expected, expected_grads) = (_step(subject.build(checkpointing=c)) for c in (True, False))
    same(loss, expected, "loss")
    _same_gradients(grads, expected_grads)


def compiled(subject: Subject) -> None:
    """torch.compile changes neither loss nor gradients beyond rounding."""
    plain, model = subject.build(), subject.build()
    model.compile()
    same(model.nll(batch()), plain.nll(batch()), "loss", tolerance=CLOSE)
    _same_gradients(_gradients(model), _gradients(plain))


def save_and_load(subject: Subject) -> None:
    """What was trained survives saving and loading, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        model = subject.build(seed=1)
        model.save(Path(folder))
        same(subject.load(Path(folder)).nll(batch()), model.nll(batch()), "loss")


def bf16(subject: Subject) -> None:
    """bf16 is close to fp32: the batch's loss within 3 %."""
    exact, rounded = (subject.build(precision=precision).nll(batch()).sum() for precision in ("fp32", "bf16"))
    same(rounded / exact, torch.ones(()), "loss, relative", tolerance=BF16)
    if rounded == exact:
        raise Failed("the loss is that of fp32 to the last bit: nothing ran in bf16")


CHECKS: dict[str, Callable[[Subject], None]] = {
    "length 0": length_0,
    "gradient": gradient,
    "positions": positions,
    "padding": padding,
    "cached decoding": cached_decoding,
    "mixed loss": mixed_loss,
    "mixed greedy": mixed_greedy,
    "mixed beams": mixed_beams,
    "mixed sampling": mixed_sampling,
    "unequal lengths": unequal_lengths,
    "checkpointing": gradient_checkpointing,
    "compile": compiled,
    "save, load": save_and_load,
    "bf16": bf16,
}


def _mixing(subject: Subject) -> Model:
    if not subject.by_row:
        raise NotApplicable("one prompt or adapter for all rows of a batch")
    return subject.build()


def _tasks(rows: Batch) -> list[tuple[int, list[int]]]:
    return [(task, (rows.task_B == task).nonzero().flatten().tolist()) for task in range(NUM_TASKS)]


def _mixed_text(model: Model, rows: Batch, *, num_beams: int) -> None:
    made = model.generate(rows, num_beams=num_beams)
    for task, which in _tasks(rows):
        same_text(made[which], model.generate(rows.rows(which), num_beams=num_beams), f"task {task}")


def _gradients(model: Model) -> dict[str, torch.Tensor]:
    model.loss(batch()).backward()
    return {name: weight.grad for name, weight in model.trained().items() if weight.grad is not None}


def _step(model: Model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.training()
    torch.manual_seed(0)
    loss = model.loss(batch())
    loss.backward()
    return loss.detach(), {n: weight.grad for n, weight in model.trained().items() if weight.grad is not None}


def _same_gradients(grads: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if grads.keys() != expected.keys():
        raise Failed(f"gradient for {sorted(grads)}, expected {sorted(expected)}")
    for name, grad in grads.items():
        same(grad, expected[name], f"gradient of {name}", tolerance=1e-4)
