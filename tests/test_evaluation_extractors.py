"""torch-fidelity's networks as encoders, own networks as torch-fidelity's, judges."""

from __future__ import annotations

import pytest
import torch

from retrodiff.encoders import TimmEncoder, save_encoder
from retrodiff.evaluation import (
    FidelityExtractor,
    Judge,
    evaluate,
    features_from_string,
    inception_score,
    judged_accuracy,
    register_extractor,
    timm_judge,
)
from retrodiff.evaluation.judges import labels_of_prompts
from retrodiff.evaluation.sets import read_source
from retrodiff.evaluation.views import Views
from retrodiff.testing import check_encoder

fidelity = pytest.importorskip("torch_fidelity", reason="no torch-fidelity")


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return TimmEncoder("test_resnet", image_size=32)


@pytest.fixture(scope="module")
def head():
    torch.manual_seed(1)
    return torch.nn.Linear(96, 5).requires_grad_(False)


@pytest.fixture(scope="module")
def registered(encoder, head):
    register_extractor("retrodiff-test", encoder, head=head)
    register_extractor("retrodiff-test-bare", encoder.encode_image)


class Pixels(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


@pytest.fixture(scope="module")
def pixels():
    generator = torch.Generator().manual_seed(2)
    a = torch.randint(0, 256, (120, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return a, (a.float() * 0.7).byte().roll(1, 0)


def test_an_own_network_gives_the_numbers_of_torch_fidelity(registered, encoder, pixels):
    from retrodiff.evaluation import frechet_distance, kernel_distance, precision_recall

    a, b = pixels
    theirs = fidelity.calculate_metrics(
        input1=Pixels(a), input2=Pixels(b), feature_extractor="retrodiff-test", cuda=False,
        cache=False, save_cpu_ram=True, isc=True, fid=True, kid=True, prc=True, isc_splits=1,
        kid_subset_size=50, kid_subsets=10, rng_seed=0, samples_shuffle=False, verbose=False,
    )  # fmt: skip
    extractor = FidelityExtractor("retrodiff-test")
    (fa, la), (fb, _) = (extractor.encode_with_logits(x / 127.5 - 1) for x in pixels)
    assert torch.allclose(fa, encoder.encode_image(a), atol=1e-5)
    mine = {
        "frechet_inception_distance": frechet_distance(fa, fb).value,
        "kernel_inception_distance_mean": kernel_distance(fa, fb, size=50, subsets=10).value,
        "inception_score_mean": inception_score(la).value,
    }
    precision, recall = precision_recall(fa, fb)
    mine |= {"precision": precision.value, "recall": recall.value}
    for name, value in mine.items():
        assert value == pytest.approx(theirs[name], rel=1e-4), name


def test_only_classifiers_have_an_inception_score(registered, pixels):
    assert FidelityExtractor("retrodiff-test").has_logits
    assert not FidelityExtractor("retrodiff-test-bare").has_logits
    with pytest.raises(ValueError, match="has no logits"):
        fidelity.calculate_metrics(
            input1=Pixels(pixels[0]), feature_extractor="retrodiff-test-bare", isc=True,
            cuda=False, cache=False, verbose=False,
        )  # fmt: skip


def test_contract_and_names(registered):
    found = features_from_string("fidelity:retrodiff-test")
    check_encoder(found)
    assert found.fingerprint.encoder == "fidelity:retrodiff-test:features"
    assert features_from_string("fidelity:retrodiff-test:logits").dim == 5
    with pytest.raises(ValueError, match="has no layer 'last'; it has features, logits"):
        features_from_string("fidelity:retrodiff-test:last")
    with pytest.raises(ValueError, match="no network 'inception'; it has inception-v3-compat"):
        features_from_string("fidelity:inception")
    with pytest.raises(ValueError, match="take another name"):
        register_extractor("vgg16", lambda images: images.flatten(1))


@pytest.mark.parametrize("name", ["inception-v3-compat", "dinov2-vit-s-14", "clip-vit-b-32"])
def test_weights_that_cannot_be_fetched_are_one_line(name, monkeypatch):
    from urllib.error import URLError

    def offline(*_, **__):
        raise URLError("no network")

    for module in ("inceptionv3", "clip"):
        where = f"torch_fidelity.feature_extractor_{module}.load_state_dict_from_url"
        monkeypatch.setattr(where, offline, raising=False)
    monkeypatch.setattr("torch.hub.load", offline)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    with pytest.raises(OSError, match=rf"weights of '{name}' \(URLError\): go online once"):
        features_from_string(f"fidelity:{name}")


def test_logits_are_read_with_the_features(registered, pixels):
    from retrodiff.databases import Images

    extractor = FidelityExtractor("retrodiff-test")
    found = read_source("pixels", Images(pixels[0]), Views(extractor, True), progress=False)
    assert found.logits.shape == (120, 5)
    assert torch.allclose(found.logits, extractor.encode_with_logits(pixels[0])[1], atol=1e-5)


def test_a_judge(encoder, head, pixels):
    judge = Judge("five", encoder, head, ("cat, house cat", "dog", "Frog", "car", "ship"))
    logits = head(encoder.encode_image(pixels[0]))
    asked = [judge.classes[i].split(",")[-1].strip() for i in logits.argmax(1)]
    assert judged_accuracy(judge, logits, asked).value == 1
    wrong = ["dog" if name != "dog" else "frog" for name in asked]
    score = judged_accuracy(judge, logits, wrong, (logits, asked))
    assert score.value == 0
    assert score.note == "100.0% of the reference images"
    with pytest.raises(ValueError, match="no class horse: name classes as it does"):
        judge.numbers(["horse"])


def test_classifiers_of_timm():
    judge = timm_judge("test_resnet", pretrained=False)
    assert len(judge.classes) == 1000
    assert judge.numbers(["goldfish", "Carassius auratus"]) == [1, 1]
    assert judge.head(judge.encoder.encode_image(torch.zeros(1, 3, 160, 160))).shape == (1, 1000)
    with pytest.raises(ValueError, match="2 names for 1000 classes"):
        timm_judge("test_resnet", classes=["a", "b"], pretrained=False)


def test_labels_in_prompts():
    prompts = ["A photo of a hot dog", "dogs", "a DOG.", "sea"]
    assert labels_of_prompts(prompts, ["dog", "hot dog"]) == ["hot dog", None, "dog", None]


def test_class_accuracy_of_sub_folders(tmp_path, encoder):
    from retrodiff.model.generated import to_picture

    generator = torch.Generator().manual_seed(3)
    for folder, n in (("real", 12), ("made", 6)):
        for label, level in (("dark", -0.8), ("light", 0.8)):
            (tmp_path / folder / label).mkdir(parents=True)
            for i in range(n):
                shade = level * (-1 if folder == "made" and i == 0 else 1)
                image = shade + 0.2 * torch.randn(3, 32, 32, generator=generator)
                to_picture(image).save(tmp_path / folder / label / f"{i}.png")
    report = evaluate(tmp_path / "made", tmp_path / "real", encoder, progress=False)
    score = report.score("class accuracy")
    assert score.value == pytest.approx(10 / 12)
    save_encoder(encoder, tmp_path / "saved")
    assert features_from_string(str(tmp_path / "saved")).dim == 96
