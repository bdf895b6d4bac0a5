"""From final states to logits, as the architecture does it: scalings, caps and layers after the body belong to it.

    logits = head_logits(model, states)      # [..., V] of final states [..., d]
    form = head_form(model)                  # Form(scale=0.125, cap=None), proved; or None: only the model knows

`own_logits` runs the model's own forward, in which the body is stood in for by one that gives out the given states. That is
right for every architecture, and the oracle of the quick way: where a few random states prove that

    logits = cap tanh(scale head(h) / cap),  or  scale head(h),     with head = get_output_embeddings()

and no other weight plays a part, losses may take the logits a few tokens at a time. No field of a configuration is read.
"""

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from expunge.errors import ExpungeError
from expunge.models.forward import body, inner_model, width

STATES = 4
SIZES = (0.1, 1.0, 10.0, 2.5e3, 1e4)
"""Of the largest product with the head: a cap is seen at large ones, a bend at middle ones. Half precision ends at 6.5e4."""
COLUMNS = 8192
"""Of the vocabulary, at most, that a form is fitted to; it is held against all of it."""


@dataclass(frozen=True)
class Form:
    """What the model's forward does to its head's product: times `scale`, then softly capped at `cap`."""

    scale: float = 1.0
    cap: float | None = None

    def of(self, product: torch.Tensor) -> torch.Tensor:
        """Logits of the head's product."""
        logits = product if self.scale == 1 else product * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def output_layer(model: nn.Module) -> nn.Module | None:
    """The module that gives out logits, or their beginning; None where transformers names none."""
    return inner_model(model).get_output_embeddings()


def vocabulary(model: nn.Module) -> int:
    """V, the number of logits."""
    layer: Any = output_layer(model)
    if layer is None:
        return inner_model(model).config.get_text_config().vocab_size
    return getattr(layer, "out_features", None) or len(layer.weight)


def head_logits(model: nn.Module, hidden: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
    """Logits `[..., V]` of final states `[..., d]`, as the model's own forward makes them.

    head: a frozen copy of the model's head to take instead of it. Raises ExpungeError where the head's form is not proved
    and one is given, or where the model's forward cannot be asked.
    """
    form = head_form(model)
    if form is not None:
        layer = head or output_layer(model)
        assert layer is not None  # a form is proved of a layer
        return form.of(layer(hidden))
    if head is not None:
        raise _needs_live(model)
    return own_logits(model, hidden)


def head_form(model: nn.Module) -> Form | None:
    """The proved form of the model's head, or None where it is of no such form; found once for a model and its head."""
    inner, layer = inner_model(model), output_layer(model)
    if layer is None:
        return None
    known = _FORMS.get(inner)
    if known is None or known[0]() is not layer:
        known = _FORMS[inner] = weakref.ref(layer), _proved(inner, layer)
    return known[1]


_FORMS: "weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[nn.Module], Form | None]]" = weakref.WeakKeyDictionary()


def check_copied_head(model: nn.Module) -> None:
    """ExpungeError where logits of stored states cannot be had from a copy of the head alone."""
    if head_form(model) is None:
        raise _needs_live(model)


def _needs_live(model: nn.Module) -> ExpungeError:
    return ExpungeError(
        f"{type(inner_model(model)).__name__}: its head is more than one layer, so stored states do not give its logits: "
        "set training.reference=live"
    )


def own_logits(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Logits `[..., V]` of final states `[..., d]` by the model's own forward, with gradients where they are on.

    Raises ExpungeError where that forward does not call the body.
    """
    inner = inner_model(model)
    rows = hidden.reshape(1, -1, hidden.shape[-1])
    ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=hidden.device)
    with _standing_in(inner, rows) as asked:
        # without accelerate's autocast
        logits = type(inner).forward(inner, input_ids=ids, use_cache=False).logits
    if not asked:
        raise ExpungeError(f"{type(inner).__name__} is not supported: its forward does not call its body")
    return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


class _Given(tuple):
    """What a body gives out: the states, and nothing else, under whatever name it is asked for."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextlib.contextmanager
def _standing_in(inner: PreTrainedModel, states: torch.Tensor) -> Iterator[list[bool]]:
    """The body gives out `states`, whatever it is given; the list inside is empty until it is called.

    A model may call a part of its body, as OPT its decoder: each that is a model itself stands in. Hooks on what stands in,
    such as those of steering, do not run: they have made `states` what they are.
    """
    asked: list[bool] = []

    def given(*args: Any, **kwargs: Any) -> _Given:
        asked.append(True)
        return _Given((states,))

    whole = body(inner)
    parts: list[nn.Module] = [part for part in whole.modules() if part is whole or isinstance(part, PreTrainedModel)]
    before = [(part, vars(part).get("forward"), part._forward_hooks, part._forward_pre_hooks) for part in parts]
    try:
        for part in parts:
            part.forward = given
            part._forward_hooks, part._forward_pre_hooks = OrderedDict(), OrderedDict()
        yield asked
    finally:
        for part, forward, hooks, pre_hooks in before:
            part._forward_hooks, part._forward_pre_hooks = hooks, pre_hooks
            del part.forward
            if forward is not None:  # a hook of accelerate, which lies on the instance
                part.forward = forward


@torch.no_grad()
def _proved(inner: PreTrainedModel, layer: nn.Module) -> Form | None:
    device = next(layer.parameters()).device
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(STATES, width(inner), generator=generator).to(device, inner.dtype)
    with torch.autocast(device.type, enabled=False):
        try:
            unit = layer(states).abs().max().item()
        except RuntimeError:  # it takes another width: something lies between
            return None
        if not 0 < unit < float("inf"):
            return None
        scaled = [states * (size / unit) for size in SIZES]
        products, logits = [layer(some) for some in scaled], [own_logits(inner, some) for some in scaled]
        if products[0].shape != logits[0].shape or not _rests_on(layer, inner, states):
            return None
    near = tolerance(inner)
    for form in (Form(), _fitted(products, logits)):
        if all(alike(form.of(product), found, near) for product, found in zip(products, logits, strict=True)):
            return form
    return None


def _fitted(products: list[torch.Tensor], logits: list[torch.Tensor]) -> Form:
    """The form that comes nearest, of products and logits `[N, V]` by SIZES."""
    some = slice(None, None, max(1, logits[0].shape[-1] // COLUMNS))
    product, found = (torch.stack([one[:, some] for one in each]).double() for each in (products, logits))
    most, less = found[-1].abs().max().item(), found[:-1].abs().max().item()
    cap = most if most < 2 * less else None  # four times the product, and no more of a logit: that is its bound
    if cap is not None:
        inside = found.abs() < 0.9 * cap
        product, found = product[inside], cap * torch.atanh(found[inside] / cap)
    scale = ((product * found).sum() / product.square().sum().clamp(min=1e-300)).item()
    return Form(scale, cap)


@torch.enable_grad()
def _rests_on(layer: nn.Module, inner: PreTrainedModel, states: torch.Tensor) -> bool:
    """Are the weights of `layer` all that the way from states to logits learns? A scale that is trained would not stay."""
    own, node = {id(parameter) for parameter in layer.parameters()}, own_logits(inner, states[:1]).grad_fn
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in own:
            return False
        waiting += [following for following, _ in node.next_functions]
    return True


def tolerance(model: nn.Module) -> float:
    """Of a mean difference, relative: rounding is far below it, an error far above."""
    inner = inner_model(model)
    return 1e-4 if inner.dtype.itemsize >= 4 and not getattr(inner, "is_quantized", False) else 5e-2


def alike(found: torch.Tensor, wanted: torch.Tensor, near: float) -> bool:
    """Is the mean difference at most `near` of the mean size? What is masked out, at the end of its type, must be equal."""
    usual = wanted.abs() < torch.finfo(wanted.dtype).max / 4
    found, wanted = found.to(wanted.device).float(), wanted.float()
    apart = torch.where(found == wanted, 0.0, (found - wanted).abs())
    return bool(apart.mean() <= near * wanted[usual].abs().mean())
