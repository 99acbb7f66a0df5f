"""Loading models by name, the input contract, small reference networks, features in the same pass as the logits."""

from robustbench_ext.models.contract import check_images, check_labels, check_logits, frozen_eval, logits_of
from robustbench_ext.models.loading import LoadedModel, fingerprint_module, load_model
from robustbench_ext.models.observe import Observations, Taps, observe
from robustbench_ext.models.wrap import Normalized, wrap

__all__ = [
    "LoadedModel",
    "Normalized",
    "Observations",
    "Taps",
    "check_images",
    "check_labels",
    "check_logits",
    "fingerprint_module",
    "frozen_eval",
    "load_model",
    "logits_of",
    "observe",
    "wrap",
]
