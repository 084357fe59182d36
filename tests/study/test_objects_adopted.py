"""Finished stages out of the folder of the model that is shipped: ``pocket.pack adopt``."""

import pytest
import torch

from pocket import autoencoder, latents, make, pack, training
from pocket.diffusion import Model, load_averaged
from pocket.tools import CameraTokens


def test_the_folder_that_is_shipped_becomes_finished_stages(tmp_path):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    pack.main(["adopt", "--work", str(tmp_path), "--from", str(make.OUT)])
    kept = autoencoder.load_vae(tmp_path).state_dict()
    shipped = AutoencoderKL.from_pretrained(make.OUT, subfolder="vae", torch_dtype=torch.float32)
    assert all(torch.equal(kept[k], v) for k, v in shipped.state_dict().items())
    model = load_averaged(tmp_path, "unet", Model(latents.tokenizer(tmp_path)))
    shipped = UNet2DConditionModel.from_pretrained(make.OUT / "unet", torch_dtype=torch.float32)
    own = model.unet.state_dict()
    assert all(torch.equal(own[k], v) for k, v in shipped.state_dict().items())
    text = CLIPTextModel.from_pretrained(make.OUT / "text_encoder", dtype=torch.float32)
    own = model.text_encoder.state_dict()
    assert all(torch.equal(own[k], v) for k, v in text.state_dict().items())
    camera = CameraTokens.load(make.OUT).state_dict()
    assert all(torch.equal(model.camera_encoder.state_dict()[k], v) for k, v in camera.items())


@pytest.mark.parametrize("before", ["vae.pt", "unet_state.pt"])
def test_a_folder_is_adopted_only_where_nothing_has_begun(tmp_path, capsys, before):
    (tmp_path / before).touch()
    with pytest.raises(SystemExit):
        pack.main(["adopt", "--work", str(tmp_path), "--from", str(make.OUT)])
    assert "already: give another --work" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == [before]


def test_a_unet_is_adopted_for_its_own_autoencoder_only(tmp_path, capsys):
    def adopt(name):
        pack.main(["adopt", "--name", name, "--work", str(tmp_path), "--from", str(make.OUT)])

    training.save_state(tmp_path / "vae.pt", model=autoencoder.build().state_dict())
    with pytest.raises(SystemExit):
        adopt("unet")
    assert "have different autoencoders: adopt both stages" in capsys.readouterr().err
    assert not (tmp_path / "unet_state.pt").exists()
    (tmp_path / "vae.pt").unlink()
    pack.main(["adopt", "--work", str(tmp_path), "--from", str(make.OUT)])
    (tmp_path / "unet_state.pt").unlink()
    adopt("unet")
    assert (tmp_path / "unet_state.pt").exists()
    with pytest.raises(SystemExit):
        adopt("flow")
    assert "takes no --name but unet" in capsys.readouterr().err


def test_the_folder_of_another_model_is_not_adopted(tmp_path, capsys):
    with pytest.raises(SystemExit):
        pack.main(["adopt", "--work", str(tmp_path), "--from", str(tmp_path / "none")])
    assert "is no folder of the model pocket" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("*.pt"))
