"""Mixtures that are damaged, or that a hostile coordinator signed, are refused without code, pickle or a request to a hub."""

from __future__ import annotations

import http.server
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from lutetia.cli.main import app
from lutetia.models.data.encode.latents import PER_FRAME, VIDEO
from lutetia.models.mixing.description import FILE, read_mixture, verify_mixture
from lutetia.models.mixing.layout import AUTOENCODERS, PIPELINE, WEIGHTS, WEIGHTS_INDEX
from lutetia.models.pipeline import load_pipeline
from lutetia.system.errors import ConfigError, IntegrityError, UsageError
from tests.models.mixing.tiny_mixture import compressed_mixture, edit, signed_anew
from tests.models.tiny_experts import OWNER

KEYS = [OWNER.public_key]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def stitched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed_mixture(tmp_path_factory.mktemp("stitched"), shards=2)


@pytest.fixture
def mixture(stitched: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(stitched, tmp_path / "mixture")
    return tmp_path / "mixture"


def use(folder: Path) -> None:
    """Load everything: both experts, router and autoencoder."""
    load_pipeline(folder)("a ball", 1, mode="full", seed=0)


def cut(folder: Path, name: str) -> None:
    os.truncate(folder / name, 200)


def pickled(folder: Path, part: str) -> None:
    """The same weights, in the form that `torch.load` reads."""
    weights = folder / part / WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()


DAMAGES: dict[str, tuple[Change, str]] = {
    "an expert cut off": (lambda m: cut(m, f"expert_001/{WEIGHTS}"), r"expert_001 of the mixture \S+ is damaged: .* 200 bytes"),
    "an LFS pointer": (lambda m: (m / "expert_001" / WEIGHTS).write_text(POINTER), "expert_001 of the mixture"),
    "a changed router": (lambda m: (m / "router" / WEIGHTS).write_bytes(bytes(9)), "router of the mixture"),
    "an autoencoder cut off": (lambda m: cut(m, f"vae/{WEIGHTS}"), "vae of the mixture"),
    "a config that is not JSON": (lambda m: (m / "transformer/config.json").write_text("{"), "transformer/config.json of the"),
    "a missing autoencoder": (lambda m: shutil.rmtree(m / "vae"), "lacks vae; fetch it again"),
    "a missing router": (lambda m: shutil.rmtree(m / "router"), "lacks router; fetch it again"),
    "a missing expert": (lambda m: shutil.rmtree(m / "expert_001"), "lacks expert_001; fetch it again"),
    "pickled experts": (lambda m: pickled(m, "expert_001"), f"lacks expert_001/{WEIGHTS}; fetch it again"),
    "a pickled router": (lambda m: pickled(m, "router"), f"lacks router/{WEIGHTS}; fetch it again"),
    "files beside those described": (lambda m: (m / "vae" / WEIGHTS_INDEX).write_text("{}"), "is not in its description"),
    "an index that is not JSON": (lambda m: (m / "model_index.json").write_text("["), "model_index.json of the mixture"),
    "a description that is not JSON": (lambda m: (m / FILE).write_text("["), "mixture.json is malformed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_part_is_named(mixture: Path, damage: str) -> None:
    change, says = DAMAGES[damage]
    change(mixture)
    with pytest.raises(IntegrityError, match=says) as refusal:
        use(mixture)
    assert "\n" not in str(refusal.value)


def test_generate_of_a_damaged_mixture_writes_nothing(mixture: Path, tmp_path: Path) -> None:
    cut(mixture, f"expert_000/{WEIGHTS}")
    cut(mixture, f"expert_001/{WEIGHTS}")
    with pytest.raises(IntegrityError, match="expert_00. of the mixture .* is damaged") as refusal:
        app(["generate", "a ball", "--mixture", str(mixture), "--out", str(tmp_path / "clip.mp4")], standalone_mode=False)
    assert refusal.value.code == 50
    assert not (tmp_path / "clip.mp4").exists()


def moved(folder: Path) -> None:
    """Experts outside of the mixture, as the config says; the description cannot say so."""
    shutil.copytree(folder, folder.parent / "elsewhere")
    edit(folder / "transformer/config.json", lambda config: config["experts"][0].update(folder="../elsewhere/expert_000"))


def brings_code(folder: Path) -> None:
    """An autoencoder that is a pipeline, with a program of its own."""
    edit(folder / "model_index.json", lambda index: index.update(vae=["diffusers", "DiffusionPipeline"]))
    (folder / "vae" / "model_index.json").write_text('{"_class_name": ["evil", "Evil"], "_diffusers_version": "0.36.0"}')
    (folder / "vae" / "evil.py").write_text("raise SystemExit('code of the mixture ran')")


HOSTILE: dict[str, tuple[Change, str]] = {
    "another pipeline.py": (lambda m: (m / "pipeline.py").write_bytes(b"import os\n" + PIPELINE), "pipeline.py is not Lutetia's"),
    "a pipeline as autoencoder": (brings_code, "names .*DiffusionPipeline.* as vae, which no mixture has"),
    "a module as autoencoder": (
        lambda m: edit(m / "model_index.json", lambda index: index.update(vae=["diffusers", "utils"])),
        "as vae, which no mixture has",
    ),
    "another library": (
        lambda m: edit(m / "model_index.json", lambda index: index.update(scheduler=["subprocess", "Popen"])),
        "as scheduler, which no mixture has",
    ),
    "pickled experts": (lambda m: pickled(m, "expert_000"), f"lacks expert_000/{WEIGHTS}; refused"),
    "experts elsewhere": (moved, "its experts are not those of the description"),
    "quantised weights": (
        lambda m: edit(m / "expert_000/config.json", lambda config: config.update(quantization_config={"quant_method": "gguf"})),
        "expert_000 of the mixture .* quantised",
    ),
    "weights of nothing": (lambda m: (m / "expert_000" / WEIGHTS).write_bytes(bytes(9)), "expert_000 of the mixture"),
    "a router of nonsense": (
        lambda m: edit(m / "router/config.json", lambda config: config.update(channels="many")), "router of the mixture",
    ),
    "a router without end": (
        lambda m: edit(m / "router/config.json", lambda config: config.update(layers=10**9)), "layers in its config is not",
    ),
    "an autoencoder without end": (
        lambda m: edit(m / "vae/config.json", lambda config: config.update(num_encoder_blocks=[10**9])),
        "num_encoder_blocks in its config is not within",
    ),
    "an expert without end": (
        lambda m: edit(m / "expert_000/config.json", lambda config: config.update(num_layers=10**9)),
        "num_layers in its config is not within",
    ),
    "a router larger than its weights": (
        lambda m: edit(m / "router/config.json", lambda config: config.update(hidden=65536)), "router of the mixture",
    ),
    "an index that leads elsewhere": (
        lambda m: (m / "vae" / WEIGHTS_INDEX).write_text('{"weight_map": {"a": "/etc/passwd"}}'), "names a file that is not",
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE)
def test_signed_attack_is_refused_without_running_code(mixture: Path, attack: str) -> None:
    change, says = HOSTILE[attack]
    change(mixture)
    signed_anew(mixture)
    with pytest.raises(IntegrityError, match=says):
        use(mixture)


def test_fetched_files_are_only_those_that_mixtures_need(mixture: Path) -> None:
    (mixture / "vae" / "README.md").write_text("of an older version, which copied the autoencoder's folder as a whole")
    (mixture / "vae" / "evil.py").write_text("raise SystemExit")
    (mixture / "expert_000" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    signed_anew(mixture)
    document = read_mixture(mixture).mixture
    others = document.files.keys() - document.known_files.keys()
    assert others == {"vae/README.md", "vae/evil.py", "expert_000/diffusion_pytorch_model.bin"}
    for name in others:
        (mixture / name).unlink()
    assert verify_mixture(mixture, KEYS) == document
    use(mixture)


def test_earlier_mixture_with_other_files_still_loads(mixture: Path) -> None:
    (mixture / "vae" / "README.md").write_text("of an older version")
    signed_anew(mixture)
    assert verify_mixture(mixture, KEYS)
    use(mixture)


def test_hostile_folder_is_not_verified(mixture: Path) -> None:
    brings_code(mixture)
    signed_anew(mixture)
    with pytest.raises(IntegrityError, match="as vae"):
        verify_mixture(mixture, KEYS)


def test_every_autoencoder_of_a_run_is_known() -> None:
    assert set(AUTOENCODERS) == set(PER_FRAME + VIDEO)


def test_stitching_copies_no_other_file_of_the_autoencoder(stitched: Path) -> None:
    assert sorted(path.name for path in (stitched / "vae").iterdir()) == ["config.json", WEIGHTS]
    assert (stitched / "pipeline.py").read_bytes() == PIPELINE


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A hub on loopback that has nothing; the paths that it was asked for."""
    asked: list[str] = []

    class Empty(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        place, paths = f"http://127.0.0.1:{server.server_port}", "/{repo_id}/resolve/{revision}/{filename}"
        settings = {"ENDPOINT": place, "HUGGINGFACE_CO_URL_TEMPLATE": place + paths, "HF_HUB_OFFLINE": False}
        for name, value in {**settings, "HF_HUB_CACHE": str(tmp_path / "cache")}.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield asked
        server.shutdown()


def test_hub_id_of_a_mixture_is_asked_for_only_if_allowed(mixture: Path, hub: list[str]) -> None:
    edit(mixture / "model_index.json", lambda index: index["latent"].update(text_encoder="stranger/encoder"))
    signed_anew(mixture)
    with pytest.raises(ConfigError, match=r"'stranger/encoder': it is on the hub .* allow that: --hub, in Python hub=True"):
        use(mixture)
    assert not hub
    with pytest.raises(ConfigError, match="stranger/encoder"):
        load_pipeline(mixture, hub=True)("a ball", seed=0)
    assert any("stranger/encoder" in path for path in hub)


def test_missing_folder_never_becomes_a_hub_id(mixture: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(mixture / "vae")
    monkeypatch.chdir(mixture.parent)
    with pytest.raises(IntegrityError, match="lacks vae"):
        use(Path("mixture"))
    shutil.rmtree(mixture / "expert_000")
    with pytest.raises(IntegrityError, match="lacks expert_000"):
        use(Path("mixture"))
    assert not hub


def test_relative_path_survives_a_change_of_folder(mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mixture.parent)
    pipe = load_pipeline("mixture")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    pipe("a ball", 1, mode="full", seed=0)
    pipe.save_pretrained("copy")
    assert verify_mixture(tmp_path / "other" / "copy", KEYS)


def test_saving_a_mixture_onto_itself_loses_nothing(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in mixture.rglob("*") if path.is_file()}
    pipe = load_pipeline(mixture)
    (mixture.parent / "link").symlink_to(mixture)
    monkeypatch.chdir(mixture)
    for place in (mixture, ".", mixture.parent / "link"):
        pipe.save_pretrained(place)
    for place in (mixture / "copy", mixture.parent):
        with pytest.raises(UsageError, match="lie within each other"):
            pipe.save_pretrained(place)
    with pytest.raises(ConfigError, match="saved as a whole"):
        pipe.transformer.save_pretrained(mixture / "transformer")
    assert {path: path.read_bytes() for path in mixture.rglob("*") if path.is_file()} == before


def test_saving_replaces_a_mixture_and_nothing_else(mixture: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(mixture)
    shutil.copytree(mixture, tmp_path / "earlier")
    (tmp_path / "earlier" / "stale").write_text("of the earlier one")
    pipe.save_pretrained(tmp_path / "earlier")
    assert verify_mixture(tmp_path / "earlier", KEYS)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").write_text("")
    with pytest.raises(UsageError, match="holds other files"):
        pipe.save_pretrained(tmp_path / "photos")
    with pytest.raises(ConfigError, match="without the options push_to_hub"):
        pipe.save_pretrained(tmp_path / "more", push_to_hub=True)


def test_unknown_option_of_the_loader_is_refused(mixture: Path) -> None:
    with pytest.raises(ConfigError, match="without the options variant"):
        type(load_pipeline(mixture)).from_pretrained(mixture, variant="fp16")
