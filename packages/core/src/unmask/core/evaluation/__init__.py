"""How good are the features? k-NN, linear and attentive probes, few labels, fine-tuning, and whether they collapsed.

Plain functions on tensors and modules, the same for every domain. What each measure does exactly is fixed by a frozen
dataclass beside it, whose defaults are the protocol of all committed results:

* `KNN`: weighted nearest neighbours on cosine similarity;
* `LinearProbe`: logistic regression on standardised frozen features;
* `WeightedProbe`: the same on a learned weighted sum of layers;
* `AttentiveProbe`: attention pooling of frozen tokens and a linear classifier, trained together;
* `FewLabels`: the linear probe on a few labels;
* `FineTuning` (in `unmask.core.evaluation.finetune`, which uses the training loop): the whole network, with layer-wise
  learning rates;
* `rankme` and `deviation`: how many dimensions the features use;
* `online_probes`: k-NN and a linear probe on a few features, for curves while training.

Every measure is fitted on the train split and chosen on the validation split; the test split is scored once.
"""

from unmask.core.evaluation.attentive import AttentiveProbe, TokenSplit, attentive_probe
from unmask.core.evaluation.features import FeatureSplit, Splits, extract, keyed_subset
from unmask.core.evaluation.knn import KNN, knn_accuracy, knn_predict
from unmask.core.evaluation.linear import FewLabels, LinearProbe, few_label_curve, linear_probe
from unmask.core.evaluation.online import online_probes
from unmask.core.evaluation.rankme import deviation, rankme
from unmask.core.evaluation.weighted import WeightedProbe, weighted_probe

__all__ = [
    "KNN",
    "AttentiveProbe",
    "FeatureSplit",
    "FewLabels",
    "LinearProbe",
    "Splits",
    "TokenSplit",
    "WeightedProbe",
    "attentive_probe",
    "deviation",
    "extract",
    "few_label_curve",
    "keyed_subset",
    "knn_accuracy",
    "knn_predict",
    "linear_probe",
    "online_probes",
    "rankme",
    "weighted_probe",
]
