import pytest
import torch

from megatron_opsd.model import gpt as model
from megatron_opsd.model.gpt import edge_stage_layers


@pytest.mark.parametrize(
    ("layers", "stages", "edges"),
    [(64, 8, (None, None)), (94, 8, (11, 11)), (3, 2, (2, 1)), (5, 4, (2, 1)), (7, 3, (2, 2)), (3, 3, (None, None))],
)
def test_uneven_layers_go_to_the_edges(layers: int, stages: int, edges: tuple[int | None, int | None]) -> None:
    assert edge_stage_layers(layers, stages) == edges


def test_every_split_adds_up() -> None:
    for layers in range(2, 100):
        for stages in range(2, layers + 1):
            first, last = edge_stage_layers(layers, stages)
            if first is not None and last is not None:
                between = layers - first - last
                assert first >= last >= 1
                assert between % max(1, stages - 2) == 0
                assert between > 0 or stages == 2


@pytest.mark.parametrize(("gpu", "loaded", "layers"), [(1, 1, "Transformer Engine"), (1, 0, "local"), (0, 1, "local")])
def test_layers_are_those_that_megatron_can_load(
    gpu: int, loaded: int, layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed package is not enough: Megatron takes its own names for it from what it could import."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
    monkeypatch.setattr(model, "HAVE_TE", bool(loaded))
    assert model.layers_in_use() == layers
