"""Augmentations: exact pixels, exact shares, distributions against their own arithmetic, independence of the batch."""

import numpy as np
import pytest
import torch
from scipy import stats

from defenses.augment import Augmentation, boxes
from robustbench_ext.errors import ConfigError
from robustbench_ext.randomness import SampleRandom

EVERYTHING = {"crop": 3, "flip": True, "cutout": 5}


def batch(n, channels=1, side=8, seed=0):
    """Images whose pixels are all different and none of them 0."""
    values = torch.randperm(n * channels * side * side, generator=torch.Generator().manual_seed(seed)) + 1
    return (values.float() / (len(values) + 1)).view(n, channels, side, side)


def draws(n, seed=0):
    return SampleRandom.of(seed, range(n), "augmentation")


def within(count, n, p):
    """Whether a binomial count is within four standard deviations of n p (one seed in 16,000 is not)."""
    return abs(count - n * p) <= 4 * np.sqrt(n * p * (1 - p))


def test_off_returns_the_very_tensors():
    x, y = batch(4), torch.arange(4)
    off = Augmentation()
    assert off.augment(x, draws(4), 0) is x
    mixed, targets = off.mix(x, y, 6, draws(4), 0)
    assert mixed is x
    assert torch.equal(targets, torch.eye(6)[:4])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_contract(channels, mode):
    x, y = batch(6, channels), torch.arange(6)
    before, state = x.clone(), torch.get_rng_state()
    augmentation = Augmentation(**EVERYTHING, crop_mode=mode, cutmix=1.0)
    view = augmentation.augment(x, draws(6), 3)
    mixed, targets = augmentation.mix(view, y, 10, draws(6), 3)
    assert torch.equal(x, before), "the images were changed in place"
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    for out in (view, mixed):
        assert out.shape == x.shape
        assert out.dtype == x.dtype
        assert out.min() >= 0
        assert out.max() <= 1
    assert targets.shape == (6, 10)
    again = Augmentation(**EVERYTHING, crop_mode=mode).augment(x, draws(6), 3)
    assert torch.equal(again, view), "the same draws give the same view"
    assert not torch.equal(augmentation.augment(x, draws(6), 4), view)
    assert not torch.equal(augmentation.augment(x, draws(6, seed=1), 3), view)
    assert augmentation.augment(x.double(), draws(6), 3).dtype == torch.float64


def test_flip():
    n = 2000
    x = batch(n, side=4)
    flip = Augmentation(flip=True)
    view = flip.augment(x, draws(n), 0)
    mirrored = torch.tensor([torch.equal(a, b.flip(2)) for a, b in zip(view, x, strict=True)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(view, x, strict=True)])
    assert bool((mirrored ^ kept).all())
    assert within(int(mirrored.sum()), n, 0.5)
    assert torch.equal(flip.augment(view, draws(n), 0), x)


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_crop_is_a_window_of_the_padded_image_at_uniform_offsets(mode):
    n, pad, side = 5000, 2, 8
    x = batch(n, side=side)
    view = Augmentation(crop=pad, crop_mode=mode).augment(x, draws(n), 0)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)), "constant" if mode == "zero" else "reflect")
    # Away from the border all pixels of an image differ, so one of them tells the offset.
    where = (x == view[:, :, 3:4, 3:4]).nonzero()
    assert len(where) == n
    dy, dx = where[:, 2] - 3 + pad, where[:, 3] - 3 + pad
    for i in range(0, n, 25):
        assert np.array_equal(view[i], padded[i, :, dy[i] : dy[i] + side, dx[i] : dx[i] + side])
    counts = torch.bincount(dy * (2 * pad + 1) + dx, minlength=25)
    assert len(counts) == 25
    chi2 = float((counts - n / 25).square().sum() / (n / 25))
    assert chi2 < stats.chi2.ppf(1 - 1e-4, 24)  # one seed in 10,000 fails


def test_a_view_does_not_depend_on_the_batch():
    x = batch(20, channels=3)
    augmentation, random = Augmentation(**EVERYTHING), draws(20)
    view = augmentation.augment(x, random, 7)
    some = torch.tensor([13, 2, 5])
    assert torch.equal(augmentation.augment(x[some], random.select(some), 7), view[some])


def test_one_augmentation_does_not_move_the_draws_of_another():
    x = batch(20)
    both = Augmentation(flip=True, cutout=3).augment(x, draws(20), 0)
    flipped = Augmentation(flip=True).augment(x, draws(20), 0)
    erased = Augmentation(cutout=3).augment(torch.ones_like(x), draws(20), 0)
    assert torch.equal(both, flipped * erased)


def test_the_draws_of_one_sample_are_independent():
    """Each pair of choices - crop down, flipped, square in the lower half - agrees in half of the samples."""
    n, size = 4000, 8
    x = batch(n, side=size)
    # Moved up by one pixel or down by one, or (a third) not at all.
    moved = Augmentation(crop=1).augment(x, draws(n), 0)
    up, down = ((moved[:, 0, row] == 0).all(1) for row in (size - 1, 0))
    flipped = (Augmentation(flip=True).augment(x, draws(n), 0) != x).flatten(1).any(1)
    low = (Augmentation(cutout=1).augment(x, draws(n), 0) == 0)[:, 0, size // 2 :].flatten(1).any(1)
    assert within(int((flipped == low).sum()), n, 0.5)
    for other in (flipped, low):
        assert within(int((down == other)[up | down].sum()), int((up | down).sum()), 0.5)


def clipped_lengths(side, size):
    """Of a segment round every centre: how much of it lies within the image."""
    return np.array([min(c - side // 2 + side, size) - max(c - side // 2, 0) for c in range(size)])


@pytest.mark.parametrize("side", [1, 4, 5, 8])
def test_cutout_area(side):
    n, size = 3000, 8
    x = batch(n, channels=3, side=size)
    view = Augmentation(cutout=side).augment(x, draws(n), 0)
    erased = view == 0
    assert torch.equal(view[~erased], x[~erased])
    assert bool((erased == erased[:, :1]).all()), "all channels lose the same pixels"
    rows, columns = erased[:, 0].any(2), erased[:, 0].any(1)
    assert torch.equal(erased[:, 0], rows[:, :, None] & columns[:, None, :])
    lengths = clipped_lengths(side, size)
    for found in (rows.sum(1).numpy(), columns.sum(1).numpy()):
        assert set(found) == set(lengths)
    # The centre is uniform and the axes are independent: the mean area is the squared mean length.
    area = erased[:, 0].sum(dim=(1, 2)).double().numpy()
    spread = np.sqrt(np.mean(lengths**2) ** 2 - np.mean(lengths) ** 4)
    assert abs(area.mean() - lengths.mean() ** 2) <= 4 * spread / np.sqrt(n)


def test_cutout_centres_are_uniform():
    n, size = 6400, 8
    erased = Augmentation(cutout=1).augment(batch(n, side=size), draws(n), 0) == 0
    counts = erased.sum(dim=(0, 1)).double()
    assert float((counts - n / 64).square().sum() / (n / 64)) < stats.chi2.ppf(1 - 1e-4, 63)


def test_boxes():
    mask = boxes(torch.tensor([[0, 3], [2, 2], [1, 1]]), torch.tensor([[2, 3], [4, 1], [0, 4]]), 4, 5)
    assert mask[0].nonzero().tolist() == [[0, 2], [0, 3], [0, 4]]
    assert mask[1].nonzero().tolist() == [[0, 2], [1, 2], [2, 2], [3, 2]]
    assert not mask[2].any()


@pytest.mark.parametrize("channels", [1, 3])
def test_cutmix_pastes_a_box_of_the_partner_and_weighs_by_pixels(channels):
    n, side = 16, 64
    x, y = batch(n, channels, side), torch.arange(n)
    mixed, targets = Augmentation(cutmix=1.0).mix(x, y, n, draws(n), 0)
    assert bool((targets.sum(1) == 1).all())
    assert bool((targets >= 0).all())
    own = targets.diagonal()
    partner = (targets - torch.diag(own)).argmax(1)  # at this size no box of these draws is empty
    assert bool((own < 1).all())
    assert bool((partner != y).all())
    pasted = mixed != x
    assert torch.equal(mixed[pasted], x[partner][pasted])
    assert bool((pasted == pasted[:, :1]).all()), "all channels get the same box"
    pasted = pasted[:, 0]
    assert torch.equal(pasted, pasted.any(2)[:, :, None] & pasted.any(1)[:, None, :])
    # 64 x 64 is a power of two: shares of pixels are exact in float32.
    assert torch.equal(own, 1 - pasted.float().mean(dim=(1, 2)))
    ring, at = [], 0
    for _ in range(n):
        ring.append(at)
        at = int(partner[at])
    assert sorted(ring) == list(range(n)), "the partners are one circle: everybody once, nobody its own"


def test_cutmix_does_not_depend_on_the_order_and_its_box_not_on_the_batch():
    n = 16
    x, y, random = batch(n, side=16), torch.arange(n), draws(n)
    augmentation = Augmentation(cutmix=0.7)
    mixed, targets = augmentation.mix(x, y, n, random, 2)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    again, targets_again = augmentation.mix(x[order], y[order], n, random.select(order), 2)
    assert torch.equal(again, mixed[order])
    assert torch.equal(targets_again, targets[order])
    some = order[:5]
    part, targets_part = augmentation.mix(x[some], y[some], n, random.select(some), 2)
    assert torch.equal(part == x[some], mixed[some] == x[some])
    assert torch.equal(targets_part[torch.arange(5), some], targets[some, some])
    assert not torch.equal(augmentation.mix(x, y, n, random, 3)[0], mixed)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_cutmix_boxes_follow_beta(alpha):
    n, size = 4000, 6
    y = torch.arange(n) % 2
    _, targets = Augmentation(cutmix=alpha).mix(batch(n, side=size), torch.arange(n), n, draws(n), 0)
    own = targets.diagonal().double().numpy()
    # A side is s when sqrt(1 - lambda) size rounds to s; given s, the clipped lengths of the axes are independent.
    edges = (np.arange(size + 2) - 0.5).clip(0, size) / size
    probability = stats.beta.cdf(1 - edges[:-1] ** 2, alpha, alpha) - stats.beta.cdf(1 - edges[1:] ** 2, alpha, alpha)
    assert probability.sum() == pytest.approx(1)
    assert within(int((own == 1).sum()), n, probability[0])
    lengths = [clipped_lengths(s, size) for s in range(size + 1)]
    moments = [
        sum(p * np.mean((v / size) ** k) ** 2 for p, v in zip(probability, lengths, strict=True)) for k in (1, 2)
    ]
    assert abs((1 - own).mean() - moments[0]) <= 4 * np.sqrt((moments[1] - moments[0] ** 2) / n)
    # Equal classes: the two parts of a target add up.
    _, targets = Augmentation(cutmix=alpha).mix(batch(n, side=size), y, 2, draws(n), 0)
    assert bool((targets.sum(1) == 1).all())


def test_cutmix_probability():
    n = 1000
    x, y = batch(n, side=16), torch.arange(n)
    mixed, targets = Augmentation(cutmix=1.0, cutmix_prob=0).mix(x, y, n, draws(n), 0)
    assert torch.equal(mixed, x)
    assert torch.equal(targets, torch.eye(n))
    always = Augmentation(cutmix=1.0).mix(x, y, n, draws(n), 0)[0]
    sometimes = Augmentation(cutmix=1.0, cutmix_prob=0.3).mix(x, y, n, draws(n), 0)[0]
    changed = [(v != x).flatten(1).any(1) for v in (always, sometimes)]
    assert torch.equal(sometimes[changed[1]], always[changed[1]]), "what is mixed is mixed alike"
    assert within(int(changed[1].sum()), int(changed[0].sum()), 0.3)


def test_a_single_image_has_no_partner():
    x, y = batch(1), torch.tensor([2])
    mixed, targets = Augmentation(cutmix=1.0).mix(x, y, 4, draws(1), 0)
    assert torch.equal(mixed, x)
    assert targets.tolist() == [[0, 0, 1, 0]]


def test_numbers_are_read_as_people_write_them():
    assert Augmentation(crop="4", cutmix="1/2") == Augmentation(crop=4, cutmix=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": -1}, "crop = -1"),
        ({"crop": 1.5}, "whole number"),
        ({"crop": float("inf")}, "crop = inf"),
        ({"crop_mode": "edge"}, "one of zero, reflect"),
        ({"flip": 1}, "flip = 1, expected true or false"),
        ({"cutout": -2}, "cutout = -2"),
        ({"cutmix": -0.5}, "cutmix = -0.5"),
        ({"cutmix": float("inf")}, "finite"),
        ({"cutmix_prob": 1.5}, "between 0 and 1"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Augmentation(**options)


def test_what_does_not_fit_the_images_is_refused():
    x = torch.rand(2, 1, 8, 6)
    with pytest.raises(ConfigError, match="crop = 6 for images of 8x6, expected less than 6"):
        Augmentation(crop=6).augment(x, draws(2), 0)
    with pytest.raises(ConfigError, match="cutout = 7 for images of 8x6, expected at most 6"):
        Augmentation(cutout=7).augment(x, draws(2), 0)
    with pytest.raises(ConfigError, match="3 samples"):
        Augmentation(flip=True).augment(x, draws(3), 0)
    with pytest.raises(ConfigError, match="3 samples"):
        Augmentation(cutmix=1.0).mix(x, torch.tensor([0, 1]), 2, draws(3), 0)
    assert Augmentation(crop=5, crop_mode="reflect", cutout=6).augment(x, draws(2), 0).shape == x.shape
