"""The spliced trunk: unbiased, exact where it has to be, and measured."""

from itertools import combinations

import pytest
import torch
from tiny_trunks import IMAGES, batch, gradient, taught, tiny
from torch import nn

from hf_lgp.control.plan import StepPlan
from hf_lgp.linear import call
from hf_lgp.linear.predictor import LinearPredictor
from hf_lgp.linear.trunk import find_trunk, spliced_trunk
from hf_lgp.rows.parts import NothingTrained, UnknownBlock
from hf_lgp.sealed import SpliceError
from hf_lgp.settings import LGPSettings


def _distance(a, b):
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if y is not None]
    return (sum((x - y).square().sum() for x, y in pairs) / sum(y.square().sum() for _, y in pairs)).sqrt().item()


@pytest.mark.parametrize("family", IMAGES)
def test_mean_over_every_draw_is_exact(family, monkeypatch):
    model = tiny(family)
    trunk = find_trunk(model)
    predictor = taught(model, trunk)
    assert predictor.ready
    state, inputs = predictor.state_dict(), batch(5, 3)
    exact, mean, seen = gradient(model, inputs), None, []
    for chosen in combinations(range(5), 2):
        order = torch.tensor([*chosen, *(i for i in range(5) if i not in chosen)])
        monkeypatch.setattr(call, "draw_order", lambda *_, order=order: (order, order.argsort()))
        predictor.load_state_dict(state)
        with spliced_trunk(trunk, StepPlan(fraction=0.4), predictor):
            drawn = gradient(model, inputs)
        seen.append(drawn)
        share = [None if g is None else g / 10 for g in drawn]
        mean = share if mean is None else [None if a is None else a + b for a, b in zip(mean, share, strict=True)]
    assert _distance(mean, exact) < 1e-10
    # Without predictions every draw would be the scaled control gradient; with them it is another.
    blank = LinearPredictor(trunk, LGPSettings(), torch.float64)
    with spliced_trunk(trunk, StepPlan(fraction=0.4), blank):
        plain = gradient(model, inputs)
    assert _distance(seen[-1], plain) > 1e-3


@pytest.mark.parametrize("family", IMAGES)
def test_all_control_is_exact(family):
    model = tiny(family)
    predictor, inputs = taught(model, find_trunk(model)), batch(9, 3)
    plain = model(**inputs)
    exact = gradient(model, inputs)
    for plan in (StepPlan(), StepPlan(measure=4), StepPlan(all_control=True)):
        with spliced_trunk(find_trunk(model), plan, predictor):
            out = model(**inputs)
            assert type(out) is type(plain) and torch.allclose(out.loss, plain.loss)
            assert _distance(gradient(model, inputs), exact) < 1e-10
    assert "forward" not in find_trunk(model).__dict__


def test_values_are_true_and_the_graph_is_that_of_the_controls():
    model, inputs = tiny("bert"), {"input_ids": torch.randint(11, (6, 7)), "labels": torch.arange(6) % 3}
    inputs["attention_mask"] = (torch.arange(7) < torch.tensor([7, 5, 6, 7, 4, 7])[:, None]).long()
    plain, predictor = (
        model(**inputs, output_hidden_states=True),
        LinearPredictor(find_trunk(model), LGPSettings(), torch.float64),
    )
    with spliced_trunk(find_trunk(model), StepPlan(fraction=0.5), predictor):
        out = model(**inputs, output_hidden_states=True)
        torch.testing.assert_close(out.logits, plain.logits)
        torch.testing.assert_close(out.hidden_states, plain.hidden_states)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, plain.logits)
        out.loss.backward()
    assert model.bert.embeddings.word_embeddings.weight.grad.any()


@pytest.mark.parametrize(("examples", "plan"), [(4, StepPlan(fraction=0.25)), (1, StepPlan(all_control=True))])
def test_no_two_gradients_share_memory(examples, plan):
    """Of one example that of the class token is a part of that of the positions: clipping in place would shrink it twice."""
    model = tiny("vit")
    predictor = LinearPredictor(find_trunk(model), LGPSettings(), torch.float64)
    with spliced_trunk(find_trunk(model), plan, predictor):
        model(**batch(examples, 3)).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len({g.untyped_storage().data_ptr() for g in gradients}) == len(gradients)


class _Tables(nn.Module):
    """Parameters without an entry for each example, of which two are parts of what a third is added to."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.first, self.rest, self.kind = (nn.Parameter(torch.zeros(rows, 8)) for rows in (1, 3, 4))

    def forward(self, x):
        return self.layer(x + torch.cat([self.first, self.rest]) + self.kind)


def test_nor_do_those_of_tables():
    trunk = _Tables()
    with spliced_trunk(trunk, StepPlan(fraction=0.5), LinearPredictor(trunk, LGPSettings())):
        trunk(torch.randn(6, 4, 8)).square().mean().backward()
    assert len({p.grad.untyped_storage().data_ptr() for p in trunk.parameters()}) == 5


def test_measurements_are_of_the_same_tensors_whatever_the_groups_reach():
    """LayerDrop leaves out other blocks for every group."""

    class Leaving(nn.ModuleList):
        def __iter__(self):
            return (block for block in super().__iter__() if float(torch.rand(())) > 0.5)

    model, seen = tiny("vit"), []
    model.vit.layers = Leaving(model.vit.layers)
    predictor = LinearPredictor(find_trunk(model), LGPSettings(), torch.float64)
    for seed in range(6):
        torch.manual_seed(seed)
        with spliced_trunk(find_trunk(model), StepPlan(measure=4), predictor, seen.append):
            model(**batch(8, 3)).loss.backward()
    assert len(seen) == 6 and {len(spread.total) for spread in seen} == {len(predictor.parameters)}


def test_measuring_finds_that_predictions_help():
    model = tiny("vit")
    trunk, found = find_trunk(model), []
    predictor = taught(model, trunk, steps=50, window=256, rank=8, ridge=1e-3)
    for step in range(4):
        with spliced_trunk(trunk, StepPlan(fraction=0.5, measure=8, seed=step), predictor, found.append):
            gradient(model, batch(32, 900 + step))
    residual, total = (sum(getattr(f, name).sum().item() for f in found) for name in ("residual", "total"))
    assert residual < 0.7 * total


def test_measured_steps_are_unmeasured_ones():
    model, inputs = tiny("vit"), batch(12, 3)
    predictor = taught(model, find_trunk(model))
    state, drawn = predictor.state_dict(), []
    for measure in (0, 4):
        predictor.load_state_dict(state)
        with spliced_trunk(find_trunk(model), StepPlan(fraction=0.75, measure=measure, seed=4), predictor):
            drawn.append(gradient(model, inputs))
    assert _distance(*drawn) < 1e-10


def test_arguments_that_ask_for_a_gradient_are_refused():
    model, inputs = tiny("vit"), batch(4, 3)
    predictor = LinearPredictor(find_trunk(model), LGPSettings(), torch.float64)
    inputs["pixel_values"].requires_grad_()
    with spliced_trunk(find_trunk(model), StepPlan(fraction=0.5), predictor):
        with pytest.raises(SpliceError, match="asks for a gradient"):
            model(**inputs)


class _Odd(nn.Module):
    base_model_prefix = "trunk"

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk


def test_trunks_that_are_refused():
    for trunk, reason in (
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "BatchNorm"),
        (nn.Linear(2, 2).requires_grad_(False), "trained"),
        (None, "base_model_prefix"),
    ):
        with pytest.raises(UnknownBlock, match=reason):
            find_trunk(_Odd(trunk))
    with pytest.raises(UnknownBlock, match="base_model_prefix"):
        find_trunk(nn.Linear(2, 2))


@pytest.mark.parametrize("spoil", [lambda y: y.mean(), lambda y: y.sum(0), lambda y: {y}])
def test_outputs_that_cannot_be_split(spoil):
    trunk = nn.Linear(2, 4).double()
    trunk.forward = lambda x: (spoil(nn.Linear.forward(trunk, x)),)
    predictor = LinearPredictor(trunk, LGPSettings(), torch.float64)
    with spliced_trunk(trunk, StepPlan(fraction=0.5), predictor), pytest.raises(SpliceError):
        trunk(torch.randn(6, 2, dtype=torch.float64))


def test_two_calls_of_a_trunk_in_one_step():
    model, inputs, other = tiny("vit"), batch(6, 3), batch(6, 4)
    predictor = taught(model, find_trunk(model))
    exact = [a + b for a, b in zip(gradient(model, inputs), gradient(model, other), strict=True)]
    with spliced_trunk(find_trunk(model), StepPlan(measure=4), predictor):
        both = model(**inputs).loss + model(**other).loss
        assert _distance(torch.autograd.grad(both, list(model.parameters())), exact) < 1e-10


def test_what_is_trained_later_ends_predictions():
    model = tiny(next(iter(IMAGES)))
    trunk = find_trunk(model)
    frozen = next(trunk.parameters()).requires_grad_(False)
    predictor = LinearPredictor(trunk, LGPSettings(window=8, rank=2))
    frozen.requires_grad_()
    with pytest.raises(SpliceError, match="other parameters"), spliced_trunk(trunk, StepPlan(0.5), predictor):
        gradient(model, batch(4, 0))


def test_hooks_of_parameters_are_refused_since_they_would_run_twice():
    model = tiny(next(iter(IMAGES)))
    trunk = find_trunk(model)
    predictor = LinearPredictor(trunk, LGPSettings(window=8, rank=2))
    next(trunk.parameters()).register_hook(lambda g: 0.1 * g)
    with pytest.raises(UnknownBlock, match="hooks"):
        find_trunk(model)
    with pytest.raises(SpliceError, match="hooks"), spliced_trunk(trunk, StepPlan(0.5), predictor):
        gradient(model, batch(4, 0))


def test_who_listens_within_the_trunk_would_not_be_told_of_all_examples():
    model, heard = tiny("vit"), []
    predictor = LinearPredictor(find_trunk(model), LGPSettings(), torch.float64)
    find_trunk(model).register_forward_hook(lambda _, args, out: heard.append(len(out.last_hidden_state)))
    with spliced_trunk(find_trunk(model), StepPlan(fraction=0.5), predictor):
        model(**batch(4, 3)).loss.backward()
        assert heard == [4], "the trunk's own output is whole"
        model.vit.layers[0].register_forward_hook(lambda *_: None)
        with pytest.raises(SpliceError, match="a hook in its blocks"):
            model(**batch(4, 3))


def test_a_frozen_trunk_has_nothing_to_predict():
    model = tiny(next(iter(IMAGES)))
    for parameter in find_trunk(model).parameters():
        parameter.requires_grad_(False)
    with pytest.raises(NothingTrained):
        find_trunk(model)


def test_under_autocast_every_weight_has_its_exact_gradient():
    """The others run first and without a graph: autocast must not hand their copies of weights to the control examples."""
    model, inputs = tiny("vit").float(), {k: v.float() if v.is_floating_point() else v for k, v in batch(6, 3).items()}
    trunk = find_trunk(model)
    blank = LinearPredictor(trunk, LGPSettings(), torch.float32)
    with torch.autocast("cpu", torch.bfloat16), spliced_trunk(trunk, StepPlan(fraction=0.5), blank):
        loss = model(**inputs).loss
    loss.backward()
    weights = [m.weight for m in trunk.modules() if isinstance(m, nn.Linear)]
    assert weights and all(w.grad is not None and w.grad.any() for w in weights)
