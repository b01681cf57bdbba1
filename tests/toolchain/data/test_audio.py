"""Audio comes out as transformers' feature extractors have them."""

from __future__ import annotations

import numpy as np
import pytest

from regrow_format.errors import FormatError
from regrow_inputs import AudioPreprocessor
from regrow_toolchain.models import quiet_transformers

with quiet_transformers():
    from transformers import (
        ASTFeatureExtractor,
        SeamlessM4TFeatureExtractor,
        Wav2Vec2FeatureExtractor,
        WhisperFeatureExtractor,
    )

EXTRACTORS = {
    "wav2vec2": lambda: Wav2Vec2FeatureExtractor(),
    "wav2vec2 with a mask": lambda: Wav2Vec2FeatureExtractor(return_attention_mask=True),
    "wav2vec2 as it is": lambda: Wav2Vec2FeatureExtractor(do_normalize=False, sampling_rate=8000),
    "ast": lambda: ASTFeatureExtractor(max_length=60),
    "ast, other numbers": lambda: ASTFeatureExtractor(num_mel_bins=40, max_length=200, mean=1.0),
    "ast, not normalised": lambda: ASTFeatureExtractor(max_length=60, do_normalize=False),
    "whisper": lambda: WhisperFeatureExtractor(chunk_length=2),
    "whisper, 128 bands": lambda: WhisperFeatureExtractor(feature_size=128, chunk_length=1),
}


@pytest.mark.filterwarnings("ignore:At least one mel filter")
@pytest.mark.parametrize("length", [400, 7001, 40_000])
@pytest.mark.parametrize("name", EXTRACTORS)
def test_audio(tmp_path, name, length):
    extractor = EXTRACTORS[name]()
    extractor.save_pretrained(tmp_path)
    draw = np.random.default_rng(length)
    clip = (0.2 * np.sin(np.arange(length) / 9) + draw.normal(0, 0.05, length)).astype(np.float32)
    expected = extractor(clip, sampling_rate=extractor.sampling_rate, return_tensors="np")
    found = AudioPreprocessor.from_folder(tmp_path).feeds([clip], list(expected))
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].shape == array.shape
        np.testing.assert_allclose(found[key], array, rtol=1e-5, atol=5e-6)


def test_extractors_that_are_not_known(tmp_path):
    SeamlessM4TFeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="must be one of Wav2Vec2FeatureExtractor, AST"):
        AudioPreprocessor.from_folder(tmp_path)
