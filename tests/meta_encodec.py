"""Run by test_codecs_pretrained in a process of its own, because nothing of avray may import torchaudio.

``python meta_encodec.py PACKAGE_FOLDER OUTPUT_FOLDER``: PyPI's ``encodec`` with random weights, which it saves as
Meta saves its own (``24khz.th``, ``48khz.th``), and what it makes of a recording (``24khz.npz``, ``48khz.npz``). Its
network does not use torchaudio, only its resampling and saving do: an empty module stands in for it.
"""

import sys
import types
from pathlib import Path

sys.modules["torchaudio"] = types.ModuleType("torchaudio")
sys.path.insert(0, sys.argv[1])

import numpy as np  # noqa: E402
import torch  # noqa: E402
from encodec import EncodecModel  # noqa: E402

torch.manual_seed(0)
torch.set_grad_enabled(False)
for rate, create in (("24khz", EncodecModel.encodec_model_24khz), ("48khz", EncodecModel.encodec_model_48khz)):
    model = create(pretrained=False).eval()
    for key, value in model.state_dict().items():  # as initialised, a second of noise gives 75 equal frames
        value.mul_(2 if key.endswith("weight_g") else 1)
    latents = model.encoder(torch.randn(1, model.channels, 48_000))[0].T
    for stage, layer in enumerate(model.quantizer.vq.layers):  # about where latents are, each finer than the last
        spread = torch.randn(1024, latents.shape[1]) * latents.std(0) * 0.8**stage
        layer._codebook.embed.copy_(spread + (latents.mean(0) if stage == 0 else 0))
        layer._codebook.inited.fill_(1)
    torch.save(model.state_dict(), Path(sys.argv[2]) / f"{rate}.th")
    samples = torch.randn(1, 1, 48_000 if rate == "48khz" else 200_001) * 0.2
    heard = samples.expand(1, model.channels, -1)
    model.set_target_bandwidth(6.0)
    codes, scale = frame = model._encode_frame(heard)
    scaled = heard if scale is None else heard / scale
    np.savez(Path(sys.argv[2]) / rate, samples=samples[0, 0].numpy(), codes=codes[0].numpy(),
             latents=model.encoder(scaled)[0].numpy(), decoded=model._decode_frame(frame)[0].mean(0).numpy())
