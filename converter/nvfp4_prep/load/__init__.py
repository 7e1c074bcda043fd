"""Loading of one rank's share of a prepared checkpoint, which reads exactly its bytes."""

from nvfp4_prep.load.api import LoadedLayer, RankShare, load_layer, load_layers
from nvfp4_prep.load.cooperative import CooperativeGroup
from nvfp4_prep.load.group_loader import GroupLoader, TakesParameters
from nvfp4_prep.load.lazy_tensor import TensorHandle, handle_of, make_handle
from nvfp4_prep.load.loader import ExpertLoader
from nvfp4_prep.load.options import DirectIO, Gather, LoadOptions
from nvfp4_prep.load.report import LoadReport
from nvfp4_prep.load.whole_tensors import WholeTensors
from nvfp4_prep.prepared.catalog import Catalog

__all__ = [
    "Catalog",
    "CooperativeGroup",
    "DirectIO",
    "ExpertLoader",
    "Gather",
    "GroupLoader",
    "LoadOptions",
    "LoadReport",
    "LoadedLayer",
    "RankShare",
    "TakesParameters",
    "TensorHandle",
    "WholeTensors",
    "handle_of",
    "load_layer",
    "load_layers",
    "make_handle",
]
