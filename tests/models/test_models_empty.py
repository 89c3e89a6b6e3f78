"""Models without weights: the shapes of real ones, at no cost."""

import subprocess
import sys
from pathlib import Path

import torch

from tokenformer.models.base import LanguageModel
from tokenformer.models.directory import save_model
from tokenformer.models.empty import empty_model


def test_shapes_and_nothing_else(any_model: LanguageModel) -> None:
    empty = empty_model(any_model.config)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in any_model.state_dict().items()}


def test_drawing_goes_on_elsewhere(any_model: LanguageModel) -> None:
    empty_model(any_model.config)
    assert torch.empty(4).normal_(generator=torch.Generator().manual_seed(0)).std() > 0


def test_loading_does_not_import_symbolic_shapes(make_transformer, tmp_path: Path) -> None:
    save_model(make_transformer(), tmp_path / "model")
    code = "import sys, tokenformer; tokenformer.load_model(sys.argv[1]); print('sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, check=True)
    assert done.stdout.split() == [b"False"]
