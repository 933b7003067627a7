"""Small models whose layers are all Full, and sequences for them."""

import torch

from nanoglm.config import FULL, GLMConfig
from nanoglm.indexcache.calibration import Calibration
from nanoglm.model import GLM
from nanoglm.train.data import Sample

LAYERS = 5


def small(layers: int = LAYERS, seed: int = 0) -> GLM:
    config = GLMConfig.preset("tiny", num_hidden_layers=layers, num_nextn_predict_layers=0)
    config = config.replace(indexer_types=(FULL,) * layers, index_topk=4)
    return GLM(config).initialise(seed).eval()


def sequences(model: GLM, count: int = 5, length: int = 24) -> Calibration:
    ids = torch.randint(model.config.vocab_size, (count, length + 1), generator=torch.Generator().manual_seed(1))
    return Calibration(Sample.of(ids), ("text",) * count)
