import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.spatial.distance import pdist
from sklearn.neighbors import NearestNeighbors
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kernel_mmd, kid_features_to_metric

from breastcli.gan import fidelity
from breastcli.gan.fidelity import (
    Coverage,
    coverage_figures,
    diversity,
    frechet_distance,
    kernel_distance,
    nearest,
    unbiased_mmd,
)


def two_sets(n, m, num_features, seed=0):
    """Correlated features with decaying variances; the second set wider and moved."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((num_features, num_features)) * np.arange(1, num_features + 1) ** -0.5
    first = rng.standard_normal((n, num_features)) @ mixing
    second = 1.3 * rng.standard_normal((m, num_features)) @ mixing.T + 0.2
    return first, second


def moments_distance(first, second, root_trace):
    """The formula as the paper prints it, given the trace of the root of the product of the covariances."""
    covariances = [np.cov(values, rowvar=False) for values in (first, second)]
    gap = first.mean(axis=0) - second.mean(axis=0)
    return gap @ gap + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root_trace(*covariances)


def with_moments(mean, variances, n, seed):
    """(n, D) features with exactly this mean and this diagonal covariance."""
    draws = np.random.default_rng(seed).standard_normal((n, len(mean)))
    directions = np.linalg.qr(draws - draws.mean(axis=0))[0]  # orthonormal columns that sum to 0
    return directions * np.sqrt((n - 1) * np.asarray(variances)) + mean


# --- Fréchet distance


@pytest.mark.parametrize(("n", "m", "num_features"), [(200, 150, 20), (21, 500, 20)])
def test_frechet_distance_equals_the_formula_with_a_matrix_root(n, m, num_features):
    first, second = two_sets(n, m, num_features)
    expected = moments_distance(first, second, lambda a, b: np.trace(scipy.linalg.sqrtm(a @ b)).real)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("n", "m", "num_features"), [(15, 15, 40), (15, 25, 40), (15, 90, 40), (90, 15, 40)])
def test_frechet_distance_of_fewer_images_than_features(n, m, num_features):
    first, second = two_sets(n, m, num_features)

    def root_trace(one, other):
        eigenvalues = np.sort(np.linalg.eigvals(one @ other).real)
        return np.sqrt(eigenvalues[-(min(n, m) - 1) :]).sum()  # the rank; the others are 0 but for rounding

    assert frechet_distance(first, second) == pytest.approx(moments_distance(first, second, root_trace), rel=1e-6)


@pytest.mark.parametrize("shape", [(300, 12), (10, 30)])
def test_frechet_distance_of_equal_and_of_shifted_sets(shape):
    first = two_sets(shape[0], 2, shape[1])[0]
    trace = np.var(first, axis=0, ddof=1).sum()
    shift = np.linspace(-1, 2, shape[1])
    assert 0 <= frechet_distance(first, first) < 1e-6 * trace
    assert frechet_distance(first, first[::-1] + shift) == pytest.approx(shift @ shift, rel=1e-6)


def test_frechet_distance_of_known_gaussians():
    first = with_moments([0, 0, 0], [1, 4, 9], 40, seed=1)
    second = with_moments([1, 2, -2], [4, 4, 1], 50, seed=2)
    # 1 + 4 + 4 between the means; (1 - 2)² + (2 - 2)² + (3 - 1)² between the standard deviations
    assert frechet_distance(first, second) == pytest.approx(9 + 5, rel=1e-9)


def test_frechet_distance_divides_by_one_less_than_the_number():
    # one feature, standard deviations 1 and 3 with n - 1 below the line: 1/√2 and 3/√2 without
    first, second = np.array([[0.0], [2**0.5]]), np.array([[0.0], [18**0.5]])
    assert frechet_distance(first, second) == pytest.approx(((2**0.5 - 18**0.5) / 2) ** 2 + 4)


@pytest.mark.parametrize(("n", "m", "num_features"), [(300, 250, 24), (40, 60, 128)])
def test_frechet_distance_equals_torch_fidelity(n, m, num_features):
    first, second = two_sets(n, m, num_features)
    statistics = [fid_features_to_statistics(torch.from_numpy(values)) for values in (first, second)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(first, second) == pytest.approx(theirs, rel=1e-6)


def test_frechet_distance_where_squaring_would_lose_the_digits():
    # Variances over 15 decades, fewer images than features: the roots of rounded squares are off by far more than 1e-6.
    variances = np.logspace(0, -15, 120)
    turned = np.linalg.qr(np.random.default_rng(0).standard_normal((200, 120)))[0].T
    first = with_moments(np.zeros(120), variances, 150, seed=1) @ turned
    second = with_moments(np.zeros(120), 1.001 * variances, 150, seed=2) @ turned
    common = 1.001**0.5 * variances.sum()
    expected = 2.001 * variances.sum() - 2 * common
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    quick, bound = fidelity._quick_nuclear_norm(first @ second.T / 149)
    assert 1e-5 * expected < 2 * abs(quick - common) < 2 * bound  # so the bound sent it to the singular values


def test_frechet_distance_of_constant_features_is_that_of_the_means():
    assert frechet_distance(np.zeros((3, 2)), np.full((4, 2), 3.0)) == pytest.approx(18)


# --- kernel distance


def test_unbiased_mmd_by_hand():
    # k(x, y) = (xy + 1)³. Within: k(0, 1) = 1; k(1, 2) = 27. Between: k(0, ·) = 1, 1; k(1, 1) = 8, k(1, 2) = 27.
    assert unbiased_mmd(np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])) == pytest.approx(1 + 27 - 2 * 37 / 4)
    # Two features halve the product. Within: k = 1; the three of the second set: 1, 1, (1/2 + 1)³ = 3.375.
    first, second = np.array([[0.0, 0.0], [2.0, 0.0]]), np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 3.0]])
    # Between: 1, 1, 1 and 1, (2/2 + 1)³ = 8, 8
    assert unbiased_mmd(first, second) == pytest.approx(1 + (1 + 1 + 3.375) / 3 - 2 * 20 / 6)


def test_unbiased_mmd_is_zero_on_average_for_one_distribution():
    rng = np.random.default_rng(5)
    draws = [(rng.standard_normal((12, 4)), rng.standard_normal((12, 4))) for _ in range(600)]
    values = np.array([unbiased_mmd(first, second) for first, second in draws])
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean()) < 3 * error

    def diagonal(points):  # what an estimator that leaves the pairs of an image with itself in would add, times n - 1
        return ((points**2).sum(axis=1) / 4 + 1) ** 3

    biased = values + [np.mean(diagonal(a)) / 11 + np.mean(diagonal(b)) / 11 for a, b in draws]
    assert biased.mean() > 10 * error


def test_unbiased_mmd_equals_torch_fidelity():
    first, second = two_sets(80, 80, 30)
    theirs = kid_features_to_metric(
        torch.from_numpy(first), torch.from_numpy(second), kid_subsets=1, kid_subset_size=80, verbose=False, rng_seed=1
    )
    assert unbiased_mmd(first, second) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)


@pytest.mark.parametrize(
    ("n", "m", "size", "num_subsets"),
    [
        (60, 70, 50, 40),  # all kernels once
        (200, 90, 10, 3),  # subset by subset
        (30, 90, 30, 20),  # the first set whole every time
    ],
)
def test_kernel_distance_is_mean_and_deviation_over_the_subsets(n, m, size, num_subsets):
    first, second = two_sets(n, m, 16)
    rng = np.random.default_rng(4)
    values = []
    for _ in range(num_subsets):
        rows, columns = rng.choice(n, size, replace=False), rng.choice(m, size, replace=False)
        values.append(kernel_mmd(first[rows], second[columns]))
    ours = kernel_distance(first, second, subset_size=size, num_subsets=num_subsets, rng=np.random.default_rng(4))
    assert ours == pytest.approx((np.mean(values), np.std(values)), rel=1e-6)


def test_kernel_distance_has_no_deviation_with_a_single_subset():
    first, second = two_sets(20, 20, 5)
    mean, deviation = kernel_distance(first, second, rng=np.random.default_rng(0))
    assert mean == unbiased_mmd(first, second)
    assert np.isnan(deviation)
    assert np.isnan(kernel_distance(first, second, subset_size=9, num_subsets=1, rng=np.random.default_rng(0))[1])
    assert kernel_distance(first, second, subset_size=19, rng=np.random.default_rng(0))[1] > 0


# --- precision, recall, density, coverage


def test_coverage_figures_by_hand():
    real, generated = np.array([[0.0], [1.0], [3.0], [10.0]]), np.array([[0.5], [2.5], [30.0]])
    # Radii of the real, k = 1: 1, 1, 2, 7; their balls [-1, 1], [0, 2], [1, 5], [3, 17] hold 1, 1, 1, 0 generated.
    # Radii of the generated: 2, 2, 27.5; their balls [-1.5, 2.5], [0.5, 4.5], [2.5, 57.5] hold 0, 1, 3, 10: all.
    figures = coverage_figures(real, generated, k=1)
    assert figures == Coverage(precision=2 / 3, recall=1.0, density=3 / 3, coverage=3 / 4)
    # The other way round the balls [-1.5, 2.5], [0.5, 4.5], [2.5, 57.5] hold 2, 2, 2 of the four.
    assert coverage_figures(generated, real, k=1) == Coverage(precision=1.0, recall=2 / 3, density=6 / 4, coverage=1.0)
    # k = 2: real radii 3, 2, 3, 9, balls [-3, 3], [-1, 3], [0, 6], [1, 19] hold 2, 2, 2, 1.
    assert coverage_figures(real, generated, k=2) == Coverage(2 / 3, 1.0, 7 / (2 * 3), 1.0)


def test_coverage_figures_of_identical_and_of_disjoint_sets():
    points = two_sets(60, 2, 8)[0]
    same = coverage_figures(points, points[::-1].copy(), k=3)
    assert same == Coverage(precision=1.0, recall=1.0, density=pytest.approx(4 / 3), coverage=1.0)
    assert coverage_figures(points, points + 1000) == Coverage(0.0, 0.0, 0.0, 0.0)


def test_coverage_figures_count_duplicates_as_neighbours():
    real = np.repeat(np.random.default_rng(0).normal(100, 1, (2, 50)), 2, axis=0)  # every radius is 0
    assert coverage_figures(real, real, k=1) == Coverage(1.0, 1.0, 2.0, 1.0)
    assert coverage_figures(real, real + 1e-3, k=1) == Coverage(0.0, 0.0, 0.0, 0.0)


def test_coverage_figures_tell_a_collapsed_generator_from_a_noisy_one():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((200, 3))
    collapsed = coverage_figures(real, 0.05 * rng.standard_normal((200, 3)))
    noisy = coverage_figures(real, 4 * rng.standard_normal((200, 3)))
    assert collapsed.precision == 1
    assert collapsed.recall < 0.1
    assert collapsed.coverage < 0.5
    assert noisy.precision < 0.5 < noisy.recall


# --- nearest, diversity


def test_nearest_equals_scikit_learn():
    queries, references = two_sets(50, 70, 12)
    distances, indices = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(references).kneighbors(queries)
    ours = nearest(queries.astype(np.float64), references)
    assert (ours[0] == indices[:, 0]).all()
    assert ours[1] == pytest.approx(distances[:, 0], rel=1e-12)


def test_nearest_finds_identical_vectors_at_exactly_zero():
    references = np.random.default_rng(0).normal(1e4, 1, (40, 300)).astype(np.float32)
    references[7] = references[30]
    references[31] = references[30]
    references[31, 5] = np.nextafter(references[30, 5], np.float32(np.inf))  # one bit off
    references[39] += 1000  # so large that, by its measure, the bit is below rounding
    indices, distances = nearest(references[[30, 31, 12]], references)
    assert indices.tolist() == [7, 31, 12]
    assert distances.tolist() == [0, 0, 0]


def test_nearest_without_oneself():
    points = np.array([[0.0], [1.0], [5.0], [5.0], [9.0]])
    indices, distances = nearest(points, points, exclude_self=True)
    assert indices.tolist() == [1, 0, 3, 2, 2]
    assert distances.tolist() == [1, 1, 0, 0, 4]


def test_diversity_by_hand():
    assert diversity(np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]])) == pytest.approx((5 + 4 + 3) / 3)
    assert diversity(np.full((5, 200), 0.1)) == 0
    assert diversity(np.array([[1e6, 0.0], [1e6, 1.0]])) == pytest.approx(1)


def test_diversity_counts_nothing_between_duplicates():
    points = np.repeat(np.random.default_rng(0).standard_normal((20, 300)), 2, axis=0)
    assert diversity(points) == pytest.approx(pdist(points).mean(), rel=1e-10)


def test_figures_do_not_depend_on_the_block_size(monkeypatch):
    first, second = two_sets(53, 47, 6)

    def figures():
        indices, distances = nearest(first, first, exclude_self=True)
        others = coverage_figures(first, second, k=2)
        rest = [others.precision, others.recall, others.density, others.coverage, diversity(first)]
        return np.concatenate([indices, distances, rest, [unbiased_mmd(first, second)]])

    whole = figures()
    monkeypatch.setattr(fidelity, "BLOCK_BYTES", 8 * 53 * 10)  # ten rows at a time, the last block shorter
    assert len(list(fidelity._blocks(53, 53))) == 6
    assert figures() == pytest.approx(whole, rel=1e-9)


def test_float32_features_are_measured_in_float64():
    first, second = (values.astype(np.float32) for values in two_sets(40, 40, 60))
    wide = first.astype(np.float64), second.astype(np.float64)
    assert frechet_distance(first, second) == frechet_distance(*wide)
    assert unbiased_mmd(first, second) == unbiased_mmd(*wide)
    assert diversity(first) == diversity(wide[0])


@pytest.mark.parametrize("figure", [frechet_distance, unbiased_mmd, coverage_figures, nearest])
def test_features_that_are_not_finite_are_refused(figure):
    first, second = two_sets(10, 10, 3)
    second[4, 1] = np.nan
    with pytest.raises(AssertionError, match="finite"):
        figure(first, second)


def test_a_distribution_needs_two_images():
    for figure in (frechet_distance, unbiased_mmd):
        with pytest.raises(AssertionError, match="at least 2"):
            figure(np.zeros((1, 3)), np.zeros((5, 3)))
