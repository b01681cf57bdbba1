"""Raw input to the arrays that a bundle takes: images, audio and text, without torch.

    reader = InputReader.from_bundle(bundle)
    [(label, probability)] = answer(bundle, reader.audio(["clip.wav"]))

Audio needs nothing but NumPy; files of images need pillow and texts `tokenizers`, which the extra
`run` brings and which are imported when they are needed.
"""

from .audio import AudioPreprocessor
from .image_files import IMAGE_ENDINGS, as_images, read_image
from .images import PREPROCESSOR, ImagePreprocessor
from .predictions import answer, mean_embeddings, top_answers
from .reader import InputReader
from .text import TextPreprocessor
from .wav import WAV_ENDINGS, read_wav, resample

__all__ = [
    "IMAGE_ENDINGS",
    "PREPROCESSOR",
    "WAV_ENDINGS",
    "AudioPreprocessor",
    "ImagePreprocessor",
    "InputReader",
    "TextPreprocessor",
    "answer",
    "as_images",
    "mean_embeddings",
    "read_image",
    "read_wav",
    "resample",
    "top_answers",
]
