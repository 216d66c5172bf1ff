"""Networks of one sample, which map (s, t, x, cond) to an output shaped like x, and wrappers for other networks.

``NETS`` maps names to constructors of flax.linen modules; these take the fields of the module as keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn

from jflow.nets import conditioning
from jflow.nets.attention import attention
from jflow.nets.conditioning import Conditioning, ConditionTokens
from jflow.nets.dit import DiT
from jflow.nets.embeddings import fourier, octaves, random_fourier, sinusoidal
from jflow.nets.log_weight import LogWeight, Weighted, with_log_weight
from jflow.nets.mixer import Mixer
from jflow.nets.mlp import MLP
from jflow.nets.multi_output import MultiOutput
from jflow.nets.signatures import Network
from jflow.nets.unet import UNet
from jflow.nets.unwrap import to_equinox, to_nnx
from jflow.nets.wrappers import check_independent, from_equinox, from_function, from_linen, from_nnx

NETS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "mlp_plain": MLP.plain,
    "mixer": Mixer,
    "dit": DiT,
    "dit_tokens": DiT.in_context,
    "unet": UNet,
    "unet_mp": UNet.magnitude_preserving,
}

__all__ = [
    "MLP",
    "NETS",
    "ConditionTokens",
    "Conditioning",
    "DiT",
    "LogWeight",
    "Mixer",
    "MultiOutput",
    "Network",
    "UNet",
    "Weighted",
    "attention",
    "check_independent",
    "conditioning",
    "fourier",
    "from_equinox",
    "from_function",
    "from_linen",
    "from_nnx",
    "octaves",
    "random_fourier",
    "sinusoidal",
    "to_equinox",
    "to_nnx",
    "with_log_weight",
]
