"""Parameter rules: how a module's input and output gradient factor its parameters' per-example gradients.

A rule belongs to one module and speaks for some of its parameters, arranged as one gradient matrix (a weight with its bias
as an extra column, a LayerNorm's weight and bias as two rows). It turns the module's input ``x`` and output gradient
``delta`` into :class:`~hf_lgp.factors.Factors`, and a predicted gradient matrix back into parameter gradients.

To cover a new layer, subclass :class:`Rule` and add it to :data:`MODULE_RULES`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .factors import Factors


class Rule(ABC):
    """Per-example gradients of one module's parameters.

    Attributes:
        name: Qualified name of the module (or of the parameter, for parameters used outside of a layer).
        module: The user's module; never changed.
        parameters: The parameters covered, in the order of :meth:`gradients`.
        rows: Rows of the gradient matrix.
        cols: Columns of the gradient matrix.
        rank_factor: How many times the usual rank the tensor deserves.
    """

    rows: int
    cols: int
    rank_factor: int = 1

    def __init__(self, name: str, module: nn.Module, parameters: list[Tensor]) -> None:
        self.name, self.module, self.parameters = name, module, parameters

    @staticmethod
    @abstractmethod
    def matches(module: nn.Module) -> bool:
        """Whether the rule can speak for this module."""

    @abstractmethod
    def factors(self, inputs: Tensor, delta: Tensor, examples: int, chosen: Tensor | slice) -> Factors | None:
        """Factors of the chosen examples' gradients.

        Args:
            inputs: The module's first argument.
            delta: Gradient with respect to the module's output.
            examples: Number of examples in the batch the module ran on.
            chosen: Which of them to return.

        Returns:
            The factors, or None when the rows cannot be told apart by example (the first dimension is not batch-major).
        """

    @abstractmethod
    def gradients(self, matrix: Tensor) -> list[Tensor]:
        """Gradients of :attr:`parameters` from the gradient matrix, shape ``(rows, cols)``."""


def _by_example(tensor: Tensor, examples: int, chosen: Tensor | slice) -> Tensor | None:
    """``(examples * s, ..., d)`` as ``(chosen, s * ..., d)``."""
    if tensor.dim() < 2 or tensor.shape[0] % examples != 0:
        return None
    return tensor.reshape(examples, -1, tensor.shape[-1])[chosen]


class LinearRule(Rule):
    """``nn.Linear``: ``l = delta``, ``r = [x; 1]``."""

    def __init__(self, name: str, module: nn.Linear) -> None:
        self._biased = module.bias is not None and module.bias.requires_grad
        super().__init__(name, module, [p for p in (module.weight, module.bias) if p is not None and p.requires_grad])
        self.rows, self.cols = module.out_features, module.in_features + int(self._biased)

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return type(module) is nn.Linear and module.weight.requires_grad

    def factors(self, inputs: Tensor, delta: Tensor, examples: int, chosen: Tensor | slice) -> Factors | None:
        left, right = _by_example(delta, examples, chosen), _by_example(inputs, examples, chosen)
        if left is None or right is None or left.shape[:2] != right.shape[:2]:
            return None
        return Factors(left, right, self.rows, ones=self._biased)

    def gradients(self, matrix: Tensor) -> list[Tensor]:
        if not self._biased:
            return [matrix]
        return [matrix[:, :-1], matrix[:, -1]]


class ConvRule(Rule):
    """``nn.Conv2d`` without groups, as a matrix on unfolded patches (a patch embedding, for one)."""

    def __init__(self, name: str, module: nn.Conv2d) -> None:
        self._biased = module.bias is not None and module.bias.requires_grad
        super().__init__(name, module, [p for p in (module.weight, module.bias) if p is not None and p.requires_grad])
        self.rows = module.out_channels
        self.cols = module.weight[0].numel() + int(self._biased)

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return (
            type(module) is nn.Conv2d
            and module.weight.requires_grad
            and module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )

    def factors(self, inputs: Tensor, delta: Tensor, examples: int, chosen: Tensor | slice) -> Factors | None:
        if inputs.shape[0] != examples:
            return None
        return Factors(delta[chosen].flatten(2).mT, self.patches(inputs[chosen]), self.rows, ones=self._biased)

    def patches(self, inputs: Tensor) -> Tensor:
        """The convolution's windows as rows, shape ``(b, T, in_channels * window)``, in the order of its output."""
        windows = {name: getattr(self.module, name) for name in ("kernel_size", "dilation", "padding", "stride")}
        return F.unfold(inputs, **windows).mT

    def gradients(self, matrix: Tensor) -> list[Tensor]:
        shape = self.parameters[0].shape
        if not self._biased:
            return [matrix.reshape(shape)]
        return [matrix[:, :-1].reshape(shape), matrix[:, -1]]


class LayerNormRule(Rule):
    """``nn.LayerNorm`` over the last dimension: two rows, the weight's and the bias's gradient, summed over tokens."""

    def __init__(self, name: str, module: nn.LayerNorm) -> None:
        super().__init__(name, module, [p for p in (module.weight, module.bias) if p is not None])
        self.rows, self.cols = len(self.parameters), module.normalized_shape[0]

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return (
            type(module) is nn.LayerNorm
            and len(module.normalized_shape) == 1
            and module.weight is not None
            and all(p.requires_grad for p in module.parameters())
        )

    def factors(self, inputs: Tensor, delta: Tensor, examples: int, chosen: Tensor | slice) -> Factors | None:
        norm = self.module
        assert isinstance(norm, nn.LayerNorm)
        rows, delta_rows = _by_example(inputs, examples, chosen), _by_example(delta, examples, chosen)
        if rows is None or delta_rows is None:
            return None
        normalised = F.layer_norm(rows, norm.normalized_shape, eps=norm.eps)
        sums = [(delta_rows * normalised).sum(1)]
        if self.rows == 2:
            sums.append(delta_rows.sum(1))
        return Factors(None, torch.stack([s.to(normalised.dtype) for s in sums], dim=1), self.rows)

    def gradients(self, matrix: Tensor) -> list[Tensor]:
        return list(matrix)


class EmbeddingRule(Rule):
    """``nn.Embedding``: ``l`` one-hot in the token, ``r = delta``."""

    def __init__(self, name: str, module: nn.Embedding) -> None:
        super().__init__(name, module, [module.weight])
        self.rows, self.cols = module.num_embeddings, module.embedding_dim

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return (
            type(module) is nn.Embedding
            and module.weight.requires_grad
            and not module.sparse
            and not module.scale_grad_by_freq
        )

    def factors(self, inputs: Tensor, delta: Tensor, examples: int, chosen: Tensor | slice) -> Factors | None:
        module = self.module
        assert isinstance(module, nn.Embedding)
        if inputs.shape[0] == 1 and examples > 1:  # position ids shared by the batch: the output is broadcast later
            return None
        ids, rows = _by_example(inputs[..., None], examples, chosen), _by_example(delta, examples, chosen)
        if ids is None or rows is None:
            return None
        ids = ids[..., 0]
        if module.padding_idx is not None:  # autograd gives the padding row no gradient
            rows = rows * (ids != module.padding_idx)[..., None]
        return Factors(ids, rows, self.rows)

    def gradients(self, matrix: Tensor) -> list[Tensor]:
        return [matrix]


class BroadcastRule(Rule):
    """A parameter with a leading dimension of 1 that is expanded over the batch or added to it (class token, positions).

    ``delta`` is the gradient of the broadcast result, shape ``(m, ...)``; summed to the parameter's shape, example by example,
    it is the parameter's per-example gradient.

    Every row of a position table has a gradient of its own, so a table needs more directions than a weight shared by all
    tokens: rank 16 keeps half of the energy of a ViT's, rank 48 nine tenths. There is one table per model.
    """

    rank_factor = 3

    def __init__(self, name: str, module: nn.Module, parameter: nn.Parameter) -> None:
        super().__init__(name, module, [parameter])
        self.rows = parameter.shape[1:-1].numel()
        self.cols = parameter.shape[-1]

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return any(BroadcastRule.fits(parameter) for parameter in module.parameters(recurse=False))

    @staticmethod
    def fits(parameter: nn.Parameter) -> bool:
        """Whether the parameter's shape is that of a batch-broadcast table: ``(1, ..., D)``."""
        return parameter.requires_grad and parameter.dim() >= 2 and parameter.shape[0] == 1

    def factors(self, inputs: Tensor, delta: Tensor, examples: int, chosen: Tensor | slice) -> Factors | None:
        shape = self.parameters[0].shape
        if delta.shape[0] != examples or delta.dim() < len(shape):
            return None
        rows = delta[chosen]
        reduced = rows.sum_to_size(rows.shape[0], *shape[1:])
        return Factors(None, reduced.reshape(rows.shape[0], self.rows, self.cols), self.rows)

    def gradients(self, matrix: Tensor) -> list[Tensor]:
        return [matrix.reshape(self.parameters[0].shape)]


class ScaleRule(Rule):
    """A vector that multiplies hidden states (layer scale): ``delta * x`` summed over rows."""

    def __init__(self, name: str, module: nn.Module, parameter: nn.Parameter) -> None:
        super().__init__(name, module, [parameter])
        self.rows, self.cols = 1, parameter.shape[0]

    @staticmethod
    def matches(module: nn.Module) -> bool:
        # What torch's own layers keep in vectors are biases and norms, which have rules of their own or none.
        own = type(module).__module__.startswith("torch.nn.")
        return not own and any(ScaleRule.fits(parameter) for parameter in module.parameters(recurse=False))

    @staticmethod
    def fits(parameter: nn.Parameter) -> bool:
        """Whether the parameter can be a vector of factors."""
        return parameter.requires_grad and parameter.dim() == 1

    def factors(self, inputs: Tensor, delta: Tensor, examples: int, chosen: Tensor | slice) -> Factors | None:
        rows, delta_rows = _by_example(inputs, examples, chosen), _by_example(delta, examples, chosen)
        if rows is None or delta_rows is None or rows.shape != delta_rows.shape or rows.shape[-1] != self.cols:
            return None
        return Factors(None, (delta_rows * rows).sum(1, keepdim=True), self.rows)

    def gradients(self, matrix: Tensor) -> list[Tensor]:
        return [matrix[0]]


MODULE_RULES: list[type[LinearRule | ConvRule | LayerNormRule | EmbeddingRule]] = [
    LinearRule,
    ConvRule,
    LayerNormRule,
    EmbeddingRule,
]
"""Rules tried on every module, first match wins."""


def trunk_rules(model: nn.Module, head: nn.Module) -> list[Rule]:
    """Rules for every trainable parameter of the trunk that has one; the head is left out.

    Parameters shared by several modules get no rule (their gradient is a sum no single module sees) and so keep their control
    gradient.
    """
    owners: dict[Tensor, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    shared = {parameter for parameter, count in owners.items() if count > 1}
    head_parameters = set(head.parameters())
    rules: list[Rule] = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if module is head or not own or any(p in shared or p in head_parameters for p in own):
            continue
        kind = next((rule for rule in MODULE_RULES if rule.matches(module)), None)
        if kind is not None:
            rules.append(kind(name, module))
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            for rule in (BroadcastRule, ScaleRule):
                if rule.matches(module) and rule.fits(parameter) and "bias" not in parameter_name:
                    rules.append(rule(f"{name}.{parameter_name}".lstrip("."), module, parameter))
    return rules


def coverage(rules: list[Rule], model: nn.Module, head: nn.Module) -> float:
    """Share of the trunk's trainable parameters that have a rule, in [0, 1]; 1 for a trunk without any."""
    head_parameters = set(head.parameters())
    total = sum(p.numel() for p in model.parameters() if p.requires_grad and p not in head_parameters)
    covered = sum(p.numel() for rule in rules for p in rule.parameters)
    return covered / total if total else 1.0


_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


def part_name(parameter: str) -> str:
    """Part of a model that a parameter belongs to, by its qualified name: its block, counted by the first number, or the rest."""
    found = _BLOCK.search(parameter)
    return f"block {found.group(1)}" if found else "embeddings and norms"
