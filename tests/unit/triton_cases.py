"""The Triton backend against the torch backend in float64; test_triton.py runs this with TRITON_INTERPRET set."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_opsd.objective import (
    Divergence,
    backend_torch,
    backend_triton,
    divergence,
    linear_divergence,
    vocab_parallel_divergence,
)
from megatron_opsd.objective.reference import reference, reference_logprobs
from megatron_opsd.objective.types import LocalSums, Logits, Normalizers, SavedForBackward
from tests.unit.test_objective_linear import VOCAB, inputs
from tests.unit.test_objective_reference import SPECS, name_of

TILE = 64
N, WIDTH = 3, TILE + 35
KINDS = backend_triton.KINDS
KERNEL_SPECS = [s for s in SPECS if s.kind in KINDS and s.clip_mode != "token"]  # to a backend `token` is no clip
SOME_SPECS = KERNEL_SPECS[::2][:3] + KERNEL_SPECS[1::2][3:6] + KERNEL_SPECS[::2][6:]  # one temperature of each
each_spec = pytest.mark.parametrize("spec", SOME_SPECS, ids=name_of)
BACKENDS = (backend_triton, backend_torch)
# Errors allowed: relative of F⁺, relative of the gradient's L2 norm (those of test_objective.py), and absolute of the
# sums that feel the normalizers' error in first order. Gradients are asked for in the dtype of the arithmetic here, as
# the interpreter cuts bf16 off where a GPU rounds.
ALLOWED = {
    torch.float64: (1e-11, 1e-11, 1e-14),
    torch.float32: (3e-6, 1e-6, 1e-6),
    torch.bfloat16: (5e-6, 1e-6, 1e-6),
}
each_dtype = pytest.mark.parametrize("dtype", list(ALLOWED), ids=str)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend_triton, "LANES", TILE // 8)
    with np.errstate(all="ignore"):
        yield


def logits_of(dtype: torch.dtype = torch.float64, n: int = N, width: int = WIDTH) -> Logits:
    """From token to token further apart: |d| from 1e-3 to 3, across both sides of SERIES_BELOW."""
    generator = torch.Generator().manual_seed(7)
    student, noise = (torch.randn(n, width, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher = 2 * student + torch.logspace(-3, 0.3, n, dtype=torch.float64)[:, None] * noise
    return Logits((2 * student).to(dtype), teacher.to(dtype))


def wide(logits: Logits) -> Logits:
    return Logits(*(side.double() for side in logits))


def normalizers_of(local: LocalSums) -> Normalizers:
    student, teacher = local.sums[0]
    return Normalizers(local.maxima, local.sums[0], divergence._log_ratio(student, teacher, local.difference))


def run_backend(backend: Any, logits: Logits, spec: Divergence, scale: Tensor | None = None, out: Tensor | None = None):
    """All three passes: (local sums, entry sums, gradient)."""
    local = backend.normalizer_sums(logits, (spec.temperature,))
    normalizers = normalizers_of(local)
    entries = backend.entry_sums(logits, normalizers, spec)
    n = len(logits.student)
    scale = torch.linspace(-1, 2, n, dtype=torch.float64) if scale is None else scale
    out = torch.empty(logits.student.shape, dtype=logits.dtype) if out is None else out
    saved = SavedForBackward(normalizers, entries.dlogp, torch.zeros(n, dtype=torch.bool))
    backend.write_gradient(logits, saved, scale.to(logits.dtype), spec, out)
    return local, entries, out


def assert_same(logits: Logits, spec: Divergence, dtype: torch.dtype) -> None:
    _, entries, gradient = run_backend(backend_triton, logits, spec)
    _, expected, expected_gradient = run_backend(backend_torch, wide(logits), spec)
    divergence_error, gradient_error, absolute = ALLOWED[dtype]
    for name, *tolerance in (
        ("unclipped", divergence_error, 0),
        ("loss", divergence_error, 0 if spec.clip_mode == "saturate" or spec.clip is None else absolute),
        ("dlogp", divergence_error, absolute),
        ("clip_count", 0, 0),
        ("log_student", divergence_error, 0),
        ("log_teacher", divergence_error, 0),
    ):
        rtol, atol = tolerance
        torch.testing.assert_close(
            getattr(entries, name).double(), getattr(expected, name), rtol=rtol, atol=atol,
            msg=lambda message, name=name: f"{name}: {message}",
        )  # fmt: skip
    assert (gradient - expected_gradient).norm() <= gradient_error * expected_gradient.norm()


@each_dtype
@pytest.mark.parametrize("temperatures", [(1.0,), (1.7, 1.0)], ids=str)
@pytest.mark.parametrize("width", [1, 2 * TILE, WIDTH])
def test_normalizer_sums(dtype: torch.dtype, temperatures: tuple[float, ...], width: int) -> None:
    logits = logits_of(dtype, width=width)
    logits.teacher[1] += torch.linspace(-30, 30, width)  # a maximum that rises in every tile
    logits.student[2] -= torch.linspace(-30, 30, width)
    actual, expected = (
        backend.normalizer_sums(given, temperatures)
        for backend, given in ((backend_triton, logits), (backend_torch, wide(logits)))
    )
    assert actual.sums.shape == (len(temperatures), 2, N)
    assert torch.equal(actual.maxima.double(), expected.maxima)
    assert torch.equal(actual.top_ids, expected.top_ids)
    error = 1e-12 if dtype is torch.float64 else 1e-6
    torch.testing.assert_close(actual.sums.double(), expected.sums, rtol=error, atol=0)
    assert ((actual.difference - expected.difference).abs() <= error * expected.sums[0].amax(0)).all()


def test_of_equal_maxima_the_first_counts() -> None:
    student, teacher = torch.zeros(2, 3, WIDTH).unbind()
    for row, columns in enumerate(([5, 6, 14], [TILE - 9, TILE + 9], [TILE + 30, WIDTH - 1])):
        student[row, columns], teacher[row, columns] = 1, 2
    teacher[0, 2] = 2
    top_ids = backend_triton.normalizer_sums(Logits(student, teacher), (1.0,)).top_ids
    assert top_ids.tolist() == [[5, TILE - 9, TILE + 30], [2, TILE - 9, TILE + 30]]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("apart", [2**-12, -(2**-12), 0.25, -1.5, 40.0])
def test_the_difference_stays_precise_when_maxima_move(apart: float, temperature: float) -> None:
    """Both sides' entries are equal, except for the second tile's only large one."""
    student = logits_of(torch.float32, n=1, width=2 * TILE).student
    student[:, TILE:] = -1e4
    student[:, TILE + 7] = 9
    teacher = student.clone()
    teacher[:, TILE + 7] += apart
    actual = backend_triton.normalizer_sums(Logits(student, teacher), (temperature,))
    expected = backend_torch.normalizer_sums(wide(Logits(student, teacher)), (temperature,))
    torch.testing.assert_close(actual.difference.double(), expected.difference, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", KERNEL_SPECS, ids=name_of)
def test_equals_the_torch_backend(spec: Divergence) -> None:
    assert_same(logits_of(), spec, torch.float64)


@each_spec
def test_equals_the_torch_backend_from_bf16(spec: Divergence) -> None:
    assert_same(logits_of(torch.bfloat16), spec, torch.bfloat16)


@pytest.mark.parametrize("beta", [0.02, 0.5, 0.97])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_mixture(beta: float, dtype: torch.dtype) -> None:
    assert_same(logits_of(dtype), Divergence(kind="jsd", beta=beta), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [None, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_close_models(kind: Any, clip: float | None, dtype: torch.dtype) -> None:
    """Where float32's textbook has no digit left. bf16 knows no small steps: a few of its logits move by one."""
    spec = Divergence(kind=kind, clip=clip, clip_mode="saturate", temperature=1.1)
    student, teacher = logits_of(dtype, n=3)
    noise = torch.randn(student.shape, generator=torch.Generator().manual_seed(8))
    teacher = student + 1e-4 * noise
    if dtype is torch.bfloat16:
        teacher = torch.where(noise.abs() < 0.05, student * (1 + 2**-7), student)
    assert_same(Logits(student, teacher), spec, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@each_spec
def test_identical_models_are_exactly_zero_apart(spec: Divergence, dtype: torch.dtype) -> None:
    student = logits_of(dtype, n=1).student
    local, entries, gradient = run_backend(backend_triton, Logits(student, student), spec)
    assert torch.count_nonzero(torch.stack([local.difference, *entries[:4]])) == 0
    assert torch.count_nonzero(gradient) == 0


@each_spec
def test_forbidden_and_extreme_entries(spec: Divergence) -> None:
    """-inf on either side or both, alone in a tile too, and logits that no float32 exponential can hold."""
    student, teacher = logits_of(torch.float32, n=4)
    student[0, 3] = teacher[0, 3] = -torch.inf
    (teacher if spec.kind == "forward_kl" else student)[0, [5, WIDTH - 1]] = -torch.inf
    student[1, :TILE] = teacher[1, :TILE] = -torch.inf
    student[2, 4], teacher[2, 4], student[2, 70], teacher[2, 80] = 1e4, -1e4, -1e4, 1e4
    student[3, 1], teacher[3, 1] = (-torch.inf, -1e4) if spec.kind == "forward_kl" else (-1e4, -torch.inf)
    assert_same(Logits(student, teacher), spec, torch.float32)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_infinite_divergences(kind: Any) -> None:
    student, teacher = logits_of(n=1)
    (student if kind == "forward_kl" else teacher)[0, 5] = -torch.inf
    for clip, mode in ((None, "entry"), (0.05, "entry"), (0.05, "saturate")):
        spec = Divergence(kind=kind, clip=clip, clip_mode=mode)  # pyright: ignore[reportArgumentType]
        (_, actual, grad), (_, expected, expected_grad) = (
            run_backend(s, Logits(student, teacher), spec) for s in BACKENDS
        )
        assert actual.unclipped[0] == torch.inf
        torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-11, atol=1e-11, equal_nan=True)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-11, equal_nan=True)


def test_a_shard_of_nothing() -> None:
    """No tokens, no entries, nothing but -inf, and NaN, which spoils its own token only."""
    for n, width in ((0, 7), (3, 0), (0, 0)):
        logits = logits_of(n=n, width=width)
        for actual, expected in zip(*(run_backend(s, logits, Divergence()) for s in BACKENDS), strict=True):
            torch.testing.assert_close(tuple(actual), tuple(expected))
    student, teacher = logits_of(torch.float32, n=5)
    student[0], teacher[0] = -torch.inf, -torch.inf
    student[1] = -torch.inf
    student[2, 70] = teacher[3, WIDTH - 1] = torch.nan
    actual, expected = (s.normalizer_sums(Logits(student, teacher), (1.0,)) for s in BACKENDS)
    torch.testing.assert_close(actual.sums, expected.sums, equal_nan=True)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours[..., [0, 1, 4]], theirs[..., [0, 1, 4]])
    assert actual.difference.isnan().tolist() == [False, False, True, True, False]
    gradient = run_backend(backend_triton, Logits(student, teacher), Divergence())[2]
    assert gradient.isnan().all(1).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_scale_zero_have_gradient_zero(kind: Any) -> None:
    spec = Divergence(kind=kind)
    student, teacher = logits_of(torch.float32, n=5)
    student[0, 5], teacher[1, 6], student[2, 7], student[3, 3] = -torch.inf, -torch.inf, torch.nan, torch.inf
    scale = torch.tensor([0, 0, 0, -0.0, 1])
    gradient = run_backend(backend_triton, Logits(student, teacher), spec, scale)[2]
    assert torch.count_nonzero(gradient[:4]) == 0
    assert torch.count_nonzero(gradient[4]) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_layouts_and_places_to_write(dtype: torch.dtype) -> None:
    spec = Divergence(kind="reverse_kl", temperature=1.7)
    logits = logits_of(dtype)
    expected = run_backend(backend_triton, logits, spec)

    def padded(side: Tensor) -> Tensor:
        return torch.nn.functional.pad(side, (0, 9), value=torch.nan)[:, :WIDTH]

    def transposed(side: Tensor) -> Tensor:
        return side.t().contiguous().t()

    for layout in (padded, transposed):
        given = Logits(layout(logits.student), layout(logits.teacher))
        out = layout(torch.empty(N, WIDTH, dtype=logits.dtype))
        for actual, wanted in zip(run_backend(backend_triton, given, spec, out=out), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))
    if dtype is not torch.float64:
        mixed = Logits(logits.student, logits.teacher.to(torch.float32))
        assert torch.equal(run_backend(backend_triton, mixed, spec)[2], expected[2])
        rounded = run_backend(backend_triton, logits, spec, out=torch.empty(N, WIDTH, dtype=torch.bfloat16))[2]
        torch.testing.assert_close(rounded.to(logits.dtype), expected[2], rtol=2**-7, atol=1e-37)

    whole = torch.nn.functional.pad(logits.student, (0, 9), value=-7)
    in_place = Logits(whole[:, :WIDTH], logits.teacher)
    written = run_backend(backend_triton, in_place, spec, out=in_place.student)[2]
    assert written.data_ptr() == whole.data_ptr()
    rounding = 2**-7 if dtype is torch.bfloat16 else 0
    torch.testing.assert_close(written.to(logits.dtype), expected[2], rtol=rounding, atol=0)
    assert whole[:, WIDTH:].eq(-7).all(), "nothing beyond the width may be written"


def test_offsets_beyond_32_bits() -> None:
    """Rows 2^31 entries apart, and columns: the memory between is never touched, so it does not exist."""
    spec = Divergence(kind="jsd")
    logits = logits_of(torch.bfloat16, n=2)
    *_, expected = run_backend(backend_triton, logits, spec)
    for stride in ((2**31, 1), (1, 2**25)):
        apart = [torch.empty(2**32, dtype=torch.bfloat16).as_strided((2, WIDTH), stride).copy_(side) for side in logits]
        out = torch.empty(2**32, dtype=torch.bfloat16).as_strided((2, WIDTH), stride)
        actual = run_backend(backend_triton, Logits(*apart), spec, out=out)[-1]
        torch.testing.assert_close(actual.float(), expected, rtol=2**-7, atol=1e-37)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.temperature != 1 and spec.kind in KINDS], ids=name_of)
def test_whole_objective(spec: Divergence, monkeypatch: pytest.MonkeyPatch) -> None:
    """From hidden states and from their logits: values, companions and gradients against the textbook."""
    monkeypatch.setattr(Divergence, "_backend", lambda self, logits: backend_triton)
    hidden, head, teacher_hidden, teacher_head, weights = inputs(n=3)
    token_ids = torch.tensor([0, 36, 7])
    student, teacher = hidden @ head.t(), teacher_hidden @ teacher_head.t()
    expected = reference(student[:, :VOCAB], teacher[:, :VOCAB], spec)
    total = (weights * expected["loss"]).sum()
    options = {"vocab_size": VOCAB, "tp_group": None, "token_ids": token_ids}
    loss, linear = linear_divergence(hidden, head, teacher_hidden, teacher_head, weights, spec, chunk_size=2, **options)
    direct = vocab_parallel_divergence(student, teacher, spec, **options)
    for out in (linear, direct):
        for name, value in expected.items():
            torch.testing.assert_close(getattr(out, name), value, rtol=1e-11, atol=1e-11)
        logprobs = reference_logprobs(student[:, :VOCAB], token_ids)
        torch.testing.assert_close(out.student_logprobs, logprobs, rtol=0, atol=1e-11)
    for actual in (loss, (weights * direct.loss).sum()):
        torch.testing.assert_close(actual, total, rtol=0, atol=1e-11)
        gradients, wanted = (torch.autograd.grad(x, (hidden, head), retain_graph=True) for x in (actual, total))
        torch.testing.assert_close(gradients, wanted, rtol=0, atol=1e-11)


def test_spans_of_the_polynomials() -> None:
    """Float32's leave out less than 1e-7 of the whole series, float64's less than 1e-13, for any mixture."""
    x = torch.linspace(-0.5, 0.5, 101, dtype=torch.float64)
    for (dtype, error), beta in product(((torch.float32, 1e-7), (torch.float64, 1e-13)), (0.02, 0.3, 0.97)):
        constants = backend_triton._constants(Divergence(kind="jsd", beta=beta), dtype)
        for name, series in (
            ("KL", backend_triton.kl_coefficients(30)),
            ("JSD", backend_triton.jsd_coefficients(beta, 60)),
        ):
            short, long = (sum(c * x**k for k, c in enumerate(cs)) for cs in (constants[name], series))
            torch.testing.assert_close(short, long, rtol=error, atol=0)
