"""The paper's predictor: readiness, resuming, states that are not its own."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_trunks import batch, gradient, taught, tiny

from hf_lgp.control.plan import StepPlan
from hf_lgp.linear.predictor import LinearPredictor
from hf_lgp.linear.trunk import find_trunk, spliced_trunk
from hf_lgp.settings import LGPSettings


def _asked(predictor):
    torch.manual_seed(5)
    a, h, w = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 8), (4, 8), (4,)))
    return [g for g in predictor.gradients(a, h, w) if g is not None]


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_resuming_is_bit_equal(tmp_path, kernel):
    model = tiny("vit")
    trunk = find_trunk(model)
    predictor = taught(model, trunk, steps=15, kernel=kernel)
    save_file(predictor.state_dict(), tmp_path / "state.safetensors")
    resumed = LinearPredictor(trunk, LGPSettings(window=96, rank=4, kernel=kernel, seed=7), torch.float64)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(_asked(predictor), _asked(resumed), strict=True))
        for each in (predictor, resumed):
            for step in range(9):
                with spliced_trunk(trunk, StepPlan(fraction=0.5, seed=step), each):
                    gradient(model, batch(12, step))
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in predictor.state_dict().items())


def test_nothing_is_predicted_before_the_window_holds_enough():
    model = tiny("vit")
    predictor = taught(model, find_trunk(model), steps=11)
    assert not predictor.ready and not _asked(predictor)
    assert taught(model, find_trunk(model), steps=12).ready


def test_scaled_losses_teach_the_same():
    model = tiny("vit")
    trunk = find_trunk(model)
    asked = []
    for scale in (1.0, 1024.0):
        predictor = LinearPredictor(trunk, LGPSettings(window=48, rank=4), torch.float64)
        for step in range(10):
            with spliced_trunk(trunk, StepPlan(), predictor):
                (scale * model(**batch(12, step)).loss).backward()
        asked.append(_asked(predictor))
    assert asked[0]
    for a, b in zip(*asked, strict=True):
        torch.testing.assert_close(a, b)


def test_infinite_gradients_leave_it_sane():
    model = tiny("vit")
    predictor = taught(model, find_trunk(model))
    with spliced_trunk(find_trunk(model), StepPlan(), predictor):
        (model(**batch(12, 0)).loss * torch.inf).backward()
    taught_on = predictor.state_dict()
    assert all(value.isfinite().all() for value in taught_on.values())


def test_foreign_states():
    trunk = find_trunk(tiny("vit"))
    state = LinearPredictor(trunk, LGPSettings(rank=3)).state_dict()
    with pytest.raises(ValueError, match="another trunk, rank"):
        LinearPredictor(trunk, LGPSettings(rank=2)).load_state_dict(state)
    with pytest.raises(ValueError, match="window"):
        LinearPredictor(trunk, LGPSettings(rank=3, window=7)).load_state_dict(state)
