"""Drop-in layers whose weight is modulated: ``AdaFMConv2d``, ``AdaFMConvTranspose2d``, ``AdaFMLinear``.

Each is its torch layer with two more parameters, ``gamma`` and ``beta``; ``weight`` and ``bias`` keep their names. A
state dict of the torch layer therefore loads with ``strict=False``, which then reports exactly gamma and beta as
missing and leaves them as they are. At gamma = 1, beta = 0, where every layer starts, the output is the torch layer's
bit for bit. ``weight`` starts frozen (``requires_grad`` False); ``bias``, gamma and beta are trained.

Source: Zhao, Cong and Carin, "On Leveraging Pretrained GANs for Generation with Limited Data", ICML 2020.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import adafm_linear, modulate, modulated_weight

_Layer = TypeVar("_Layer", bound="_Modulated")

# What a torch layer keeps in its dictionary beside its parameters and settings: anything in here would be lost.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Modulated(nn.Module):
    """gamma and beta over the two leading dimensions of ``weight``, and the way there from the plain layer and back."""

    _plain: ClassVar[type[nn.Module]]
    _settings: ClassVar[tuple[str, ...]]

    gamma: nn.Parameter
    beta: nn.Parameter
    _served: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weight = self.weight
        shape = (*weight.shape[:2], *(1,) * (weight.dim() - 2))
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.gamma = nn.Parameter(torch.empty(shape, dtype=dtype, device=weight.device))
        self.beta = nn.Parameter(torch.empty(shape, dtype=dtype, device=weight.device))
        weight.requires_grad_(False)
        self.reset_modulation()

    def reset_modulation(self) -> None:
        """Set gamma to 1 and beta to 0: the plain layer."""
        nn.init.ones_(self.gamma)
        nn.init.zeros_(self.beta)

    def reset_parameters(self) -> None:
        """Initialise weight and bias as the torch layer does, gamma and beta to identity."""
        super().reset_parameters()
        if "gamma" in self._parameters:
            self.reset_modulation()

    def serve(self, weight: Tensor | None) -> None:
        """Compute with this modulated weight until told otherwise (None): ``ModulationPlan.attach`` calls it."""
        self._served = weight

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the layer is not part of the plan that serves this one.
        state = self.__dict__.copy()
        state.pop("_served", None)
        return state

    def _modulated_weight(self, input: Tensor) -> Tensor:
        return modulated_weight(input, self.weight, self.gamma, self.beta) if self._served is None else self._served

    @classmethod
    def from_module(cls: type[_Layer], module: nn.Module, *, freeze: bool = True) -> _Layer:
        """The modulated form of a plain layer, at identity: the same output, bit for bit.

        ``weight`` and ``bias`` are the module's own Parameter objects, shared and not copied, so optimizers and tied
        weights go on as before. ``freeze`` sets ``requires_grad`` of the (shared) weight to False; that of the bias
        stays as it is. Settings and training mode are taken over; gamma and beta are made on the weight's device.

        Raises:
            TypeError: the module is not exactly the torch layer (a subclass may compute something else).
            ValueError: it carries parametrisations or hooks (spectral or weight normalisation, pruning), which the
                new layer would lose.
        """
        plain = cls._plain
        if type(module) is not plain:
            computed = getattr(module, "parametrizations", None)
            if isinstance(module, plain) and computed is not None:
                raise ValueError(
                    f"the {plain.__name__} has parametrisations of {', '.join(computed)}, which would be lost; bake "
                    "them in first with torch.nn.utils.parametrize.remove_parametrizations(module, name)"
                )
            raise TypeError(f"module is a {type(module).__name__}; {cls.__name__}.from_module takes a {plain.__name__}")
        hooks = [hook for kind in _HOOKS for hook in getattr(module, kind).values()]
        if hooks:
            names = ", ".join(getattr(hook, "__name__", type(hook).__name__) for hook in hooks)
            raise ValueError(
                f"the {plain.__name__} has hooks ({names}), which would be lost; remove them first (for spectral or "
                "weight normalisation: torch.nn.utils.remove_spectral_norm, remove_weight_norm)"
            )
        extra = sorted(({*module._parameters} - {"weight", "bias"}) | {*module._buffers} | {*module._modules})
        if extra:
            raise ValueError(
                f"the {plain.__name__} holds {', '.join(extra)} beside weight and bias, which would be lost"
            )
        # Built without storage: weight and bias are replaced, and no random number is drawn.
        layer = cls(**_settings_of(module, cls._settings), device="meta", dtype=module.weight.dtype)
        layer.weight, layer.bias = module.weight, module.bias
        if freeze:
            layer.weight.requires_grad_(False)
        layer.gamma = nn.Parameter(torch.ones_like(layer.gamma, device=module.weight.device))
        layer.beta = nn.Parameter(torch.zeros_like(layer.beta, device=module.weight.device))
        return layer.train(module.training)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """A plain torch layer with the modulated weight: the same output, bit for bit; it shares nothing with this one.

        The weight is computed in float32 (float64 for float64) and stored in the type and layout of ``weight``;
        ``requires_grad``, settings and training mode are taken over.
        """
        layer = self._plain(**_settings_of(self, self._settings), device="meta", dtype=self.weight.dtype)
        weight = modulate(self.weight, self.gamma, self.beta, dtype=self.weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return layer.train(self.training)


def _settings_of(module: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names} | {"bias": module.bias is not None}


_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class AdaFMConv2d(_Modulated, nn.Conv2d):
    """``torch.nn.Conv2d`` with the weight ``gamma * weight + beta``; gamma and beta are ``[O, I / groups, 1, 1]``.

    Arguments, padding modes and string padding as in torch; gamma and beta are float32 (float64 with a float64
    weight). The modulated weight is produced in autocast's type where autocast is active, channels-last where the input
    is. Differentiable as often as the convolution is; forward mode is not supported.
    """

    _plain = nn.Conv2d
    _settings = _CONVOLUTION

    def forward(self, input: Tensor) -> Tensor:
        weight = self._modulated_weight(input)
        return self._conv_forward(input, weight, self.bias)


class AdaFMConvTranspose2d(_Modulated, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with the weight ``gamma * weight + beta``.

    The weight is ``[in, out / groups, KH, KW]`` as torch stores it, gamma and beta ``[in, out / groups, 1, 1]``.
    Otherwise as ``AdaFMConv2d``.
    """

    _plain = nn.ConvTranspose2d
    _settings = (*_CONVOLUTION, "output_padding")

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        weight = self._modulated_weight(input)
        return F.conv_transpose2d(
            input, weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


class AdaFMLinear(_Modulated, nn.Linear):
    """``torch.nn.Linear`` with the weight ``gamma * weight + beta``; gamma and beta are ``[O, I]``. See AdaFMConv2d."""

    _plain = nn.Linear
    _settings = ("in_features", "out_features")

    def forward(self, input: Tensor) -> Tensor:
        if self._served is not None:
            return F.linear(input, self._served, self.bias)
        return adafm_linear(input, self.weight, self.bias, self.gamma, self.beta)
