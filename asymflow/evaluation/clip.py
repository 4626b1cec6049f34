"""How well images fit their captions, by a CLIP from a folder of the package `transformers`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from asymflow import packages
from asymflow.errors import InputError
from asymflow.evaluation import dinov2, features
from asymflow.text import count

PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # of which a folder needs one
CLASSES = {"clip": "CLIPModel"}  # in the package transformers


class Clip:
    """A function from images (B, 3, H, W), uint8, and their captions to (B, 2), float32: score, and whether it was cut.

    The score is 100 times the cosine of the two embeddings, or 0 if that is negative: the CLIP score (Hessel et al.
    2021) as torchmetrics gives it. Of a caption with more tokens than the model has places only the first count.
    digest: a checksum of all files that it was made of.
    Raises InputError if the folder has no CLIP, or lacks its processor or tokenizer.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        packages.need("transformers", "torchvision")
        self.model = dinov2.load(folder, CLASSES, "CLIP").to(device)
        import transformers

        if not any((folder / name).is_file() for name in PROCESSORS):
            raise InputError(f"{folder} has neither {' nor '.join(PROCESSORS)}, which say how images are resized")
        try:
            self.processor = transformers.CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as e:  # a damaged file can raise many types of errors
            reason = " ".join(str(e).split())[:200]
            raise InputError(f"{folder} has no processor of a CLIP ({type(e).__name__}: {reason})") from None
        check_tokenizer(folder, len(self.processor.tokenizer), self.model.config.text_config.vocab_size)
        self.digest = features.digest(folder)
        self.places = self.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        tokens = self.processor.tokenizer(list(captions))["input_ids"]
        cut = torch.tensor([float(len(ids) > self.places) for ids in tokens])
        options = dict(return_tensors="pt", padding=True, truncation=True, max_length=self.places)
        inputs = self.processor(text=list(captions), images=list(images.cpu()), **options).to(self.model.device)
        found = self.model(**inputs)
        cosine = torch.nn.functional.cosine_similarity(found.image_embeds.float(), found.text_embeds.float())
        return torch.stack([100 * cosine.clamp(min=0).cpu(), cut], 1)


def check_tokenizer(folder: Path, tokens: int, expected: int) -> None:
    """InputError if the tokenizer is not that of the model: without its files, transformers makes an empty one."""
    if tokens != expected:
        raise InputError(
            f"{folder} has a tokenizer of {count(tokens, 'token')}, but its CLIP was made for {expected:,}: is "
            "tokenizer.json, or vocab.json and merges.txt, missing?"
        )
