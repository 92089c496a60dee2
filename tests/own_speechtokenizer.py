"""Run by test_speechtokenizer in a process of its own, because nothing of avray may import torchaudio.

``python own_speechtokenizer.py PACKAGE_FOLDER OUTPUT_FOLDER``: PyPI's ``speechtokenizer`` (its trainer, which alone
uses torchaudio, left out) with random weights of a small size, and what it and avray make of one recording
(``own.npz``).
"""

import json
import sys
import types
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
sys.modules["speechtokenizer.trainer"] = types.ModuleType("speechtokenizer.trainer")
sys.modules["speechtokenizer.trainer"].SpeechTokenizerTrainer = None  # type: ignore[attr-defined]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from speechtokenizer.model import SpeechTokenizer  # noqa: E402

from avray.codecs.base import decode_all  # noqa: E402
from avray.codecs.pretrained import Pretrained  # noqa: E402

CONFIG = {"n_filters": 4, "dimension": 32, "strides": [8, 5, 4, 2], "lstm_layers": 2, "bidirectional": True,
          "dilation_base": 2, "residual_kernel_size": 3, "n_residual_layers": 1, "activation": "ELU",
          "sample_rate": 16_000, "n_q": 4, "semantic_dimension": 24, "codebook_size": 32}

torch.manual_seed(0)
torch.set_grad_enabled(False)
folder = Path(sys.argv[2])
model = SpeechTokenizer(CONFIG).eval()
for key, value in model.state_dict().items():  # as initialised, all frames are nearly equal
    value.mul_(2 if key.endswith("weight_g") else 1)
samples = torch.randn(1, 1, 16_000 * 20) * 0.2
latents = model.encoder(samples)[0].T
for stage, layer in enumerate(model.quantizer.vq.layers):  # about where latents are, each finer than the last
    spread = torch.randn(32, 32) * latents.std(0) * 0.8**stage
    layer._codebook.embed.copy_(spread + (latents.mean(0) if stage == 0 else 0))
    layer._codebook.inited.fill_(1)
torch.save(model.state_dict(), folder / "SpeechTokenizer.pt")
(folder / "config.json").write_text(json.dumps(CONFIG))

codec = Pretrained("speechtokenizer", path=str(folder)).load()
ours = codec.to_codes(torch.from_numpy(codec.encode_batch([samples[0, 0].numpy()])[0].T)[None])
theirs = model.encode(samples)
np.savez(folder / "own", ours=ours[0].numpy(), theirs=theirs[:, 0].numpy(),
         decoded=decode_all(codec, codec.from_codes(ours)[0].T.numpy()), expected=model.decode(theirs)[0, 0].numpy(),
         first=codec.to_codes(torch.from_numpy(latents.T.numpy())[None], 1)[0].numpy())
