"""From what a user calls a model to a folder."""

from types import SimpleNamespace

from eaft import models

from .conftest import make_model


def test_two_processes_convert_a_gguf_file_at_the_same_time(tmp_path, monkeypatch, tokenizer):
    """The one that comes second finds the first one's folder in its place, and takes it."""
    monkeypatch.setattr(models, "HF_HOME", tmp_path)

    class OtherModel:
        config = SimpleNamespace()

        def save_pretrained(self, staging):
            make_model().save_pretrained(staging)
            folder = staging.with_suffix("")  # without this process's mark
            folder.mkdir()
            (folder / "model.safetensors").write_text("the other process's")

    load = SimpleNamespace(from_pretrained=lambda *args, **kwargs: OtherModel())
    monkeypatch.setattr(models, "AutoModelForCausalLM", load)
    monkeypatch.setattr(models, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda *args, **kwargs: tokenizer))
    (tmp_path / "x.gguf").write_text("weights")
    folder = models.convert_gguf(tmp_path / "x.gguf")
    assert [path.name for path in (tmp_path / "eaft").iterdir()] == [folder.name]
    assert (folder / "model.safetensors").read_text() == "the other process's"
