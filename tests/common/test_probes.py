from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import sklearn.linear_model
import sklearn.svm
import torch
import torch.nn.functional as F
from sklearn.model_selection import StratifiedKFold
from torch import nn

from common import probes


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def blobs(count, classes=3, dim=4, noise=1.0, seed=0):
    """Gaussian clusters: features (count, dim) float32, labels (count,) int64."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = 3 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    return centres[labels] + noise * torch.randn(count, dim, generator=generator), labels


# -- linear probes


def test_full_batch_adam_against_a_plain_loop():
    (x, y), val, test = blobs(30, noise=4), blobs(20, noise=4, seed=1), blobs(25, noise=4, seed=2)
    head = nn.Linear(4, 3)
    plain = nn.Linear(4, 3)
    plain.load_state_dict(head.state_dict())
    found = probes.linear_probe_sgd((x, y), val, test, epochs=15, lr=0.05, weight_decay=0.01, head=head)
    adam, scores = torch.optim.Adam(plain.parameters(), lr=0.05, weight_decay=0.01), []
    for _ in range(15):
        adam.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        adam.step()
        scores.append([sum(int(plain(a).argmax(1)[i] == b[i]) for i in range(len(b))) / len(b) for a, b in (val, test)])
    torch.testing.assert_close(found.head.weight, plain.weight)
    assert found.val == [v for v, _ in scores]
    assert found.test == [t for _, t in scores]
    assert found.final == scores[-1][1]


def test_the_last_epoch_with_the_best_validation_score_is_kept():
    scores = iter([0.2, 0.7, 0.5, 0.9, 0.1, 0.7, 0.3, 0.9, 0.4, 0.8])  # test, validation, test, validation ...
    split = blobs(12)
    found = probes.linear_probe_sgd(split, split, split, epochs=5, lr=0.1, score=lambda labels, logits: next(scores))
    assert found.test == [0.2, 0.5, 0.1, 0.3, 0.4]
    assert found.val == [0.7, 0.9, 0.7, 0.9, 0.8]
    assert (found.best_epoch, found.early_stopping, found.final) == (3, 0.3, 0.4)
    again = probes.linear_probe_sgd(split, None, split, epochs=5, lr=0.1)
    assert (again.val, again.best_epoch, again.early_stopping) == ([], 4, again.final)


def test_best_head_is_the_one_of_the_best_epoch():
    split, head = blobs(12), nn.Linear(4, 3)
    order = iter([0, 1, 0, 0, 0, 0])
    found = probes.linear_probe_sgd(split, split, split, epochs=3, lr=0.1, head=head, score=lambda labels, logits: next(order))
    assert found.best_epoch == 0
    assert found.head is head
    fresh = probes.linear_probe_sgd(split, None, split, epochs=1, lr=0.1, head=nn.Linear(4, 3))
    assert not torch.equal(found.best_head.weight, found.head.weight)
    assert fresh.best_head is fresh.head


def test_multi_label_steps_once_a_pair_and_scores_micro_f1():
    def pair(count):
        return torch.randn(count, 5), (torch.rand(count, 3) < 0.4).long()

    train, val, test = [pair(8), pair(6)], [pair(7)], [pair(5), pair(4)]
    head, plain = nn.Linear(5, 3), nn.Linear(5, 3)
    plain.load_state_dict(head.state_dict())
    found = probes.linear_probe_sgd(train, val, test, epochs=4, lr=0.1, optimizer="adamw", weight_decay=0.1, multi_label=True, head=head)
    adam = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(4):
        for x, y in train:
            adam.zero_grad()
            F.binary_cross_entropy_with_logits(plain(x), y.float()).backward()
            adam.step()
    torch.testing.assert_close(head.weight, plain.weight)
    guess = torch.cat([plain(x) for x, _ in test]) >= 0
    truth = torch.cat([y for _, y in test]).bool()
    assert found.final == pytest.approx(2 * (guess & truth).sum().item() / (guess.sum() + truth.sum()).item())


def test_mini_batches_follow_the_generator_and_the_rate_the_steps():
    x, y = blobs(10)
    seen, head = [], nn.Linear(4, 3)
    plain = nn.Linear(4, 3)
    plain.load_state_dict(head.state_dict())

    def lr_at(step):
        seen.append(step)
        return 0.1 / (step + 1)

    probes.linear_probe_sgd(
        *[(x, y)] * 3,
        epochs=2,
        lr=9.0,
        optimizer="sgd",
        batch_size=4,
        head=head,
        lr_at=lr_at,
        generator=torch.Generator().manual_seed(1),
    )
    assert seen == [0, 1, 2, 3, 4, 5]
    generator, sgd = torch.Generator().manual_seed(1), torch.optim.SGD(plain.parameters(), lr=9.0, momentum=0.9)
    orders = [torch.randperm(10, generator=generator) for _ in range(2)]
    for step in range(6):
        rows = orders[step // 3][4 * (step % 3) : 4 * (step % 3) + 4]
        sgd.param_groups[0]["lr"] = 0.1 / (step + 1)
        sgd.zero_grad()
        F.cross_entropy(plain(x[rows]), y[rows]).backward()
        sgd.step()
    torch.testing.assert_close(head.weight, plain.weight)


def test_lars_is_that_of_mae():
    x, y = blobs(12)
    head = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3))
    weight, bias = head[1].weight.detach().clone(), head[1].bias.detach().clone()
    probes.linear_probe_sgd((x, y), None, (x, y), epochs=3, lr=0.5, optimizer="lars", head=head)
    inputs = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for _ in range(3):
        weight.requires_grad_(), bias.requires_grad_()
        slope = torch.autograd.grad(F.cross_entropy(F.linear(inputs, weight, bias), y), [weight, bias])
        weight, bias = weight.detach(), bias.detach()
        speed[0] = 0.9 * speed[0] + slope[0] * 0.001 * weight.norm() / slope[0].norm()
        speed[1] = 0.9 * speed[1] + slope[1]
        weight, bias = weight - 0.5 * speed[0], bias - 0.5 * speed[1]
    torch.testing.assert_close(head[1].weight, weight)
    torch.testing.assert_close(head[1].bias, bias)
    assert head[0].num_batches_tracked == 3  # evaluated in eval mode, trained in train mode


@pytest.mark.parametrize("standardise", [True, False])
def test_lbfgs_reaches_the_optimum_of_scikit_learn(standardise):
    train, test = blobs(60, noise=3), blobs(40, noise=3, seed=1)
    train, test = [(x.double() * torch.tensor([1.0, 5.0, 0.1, 0.0]).double() + 1, y) for x, y in (train, test)]
    head, score = probes.linear_probe_lbfgs(train, test, l2=1 / (60 * 0.5), standardise=standardise)
    scale = train[0].std(0, correction=0).numpy() if standardise else np.ones(4)
    scale = np.where(scale > 0, scale, 1)
    mean = train[0].mean(0).numpy() if standardise else 0
    expected = sklearn.linear_model.LogisticRegression(C=0.5, tol=1e-10, max_iter=5000)
    expected.fit((train[0].numpy() - mean) / scale, train[1].numpy())
    np.testing.assert_allclose(head.weight.detach().numpy() * scale, expected.coef_, atol=1e-5)
    assert score == expected.score((test[0].numpy() - mean) / scale, test[1].numpy())


def test_lbfgs_multi_label_is_one_logistic_regression_a_label():
    x = torch.randn(50, 3, dtype=torch.float64)
    y = (x @ torch.randn(3, 2, dtype=torch.float64) + torch.randn(50, 2, dtype=torch.float64) > 0).long()
    head, score = probes.linear_probe_lbfgs((x, y), (x, y), standardise=False, multi_label=True)
    for label in range(2):
        expected = sklearn.linear_model.LogisticRegression(C=1, tol=1e-10, max_iter=5000).fit(x.numpy(), y[:, label].numpy())
        np.testing.assert_allclose(head.weight[label].detach().numpy(), expected.coef_[0], atol=1e-5)
    assert score == probes.micro_f1(y, head(x) >= 0)


# -- neighbours and clusters


@pytest.mark.parametrize("temperature", [None, 0.1])
@pytest.mark.parametrize("largest", [2**25, 60])
def test_knn_against_loops(temperature, largest, monkeypatch):
    monkeypatch.setattr(probes, "LARGEST", largest)  # 60: three rows at a time
    (x, y), (query, _) = blobs(20, noise=5), blobs(8, noise=5, seed=1)
    many = (torch.rand(20, 2) < 0.5).long()
    found = probes.knn_classify(x, y, query, k=5, temperature=temperature)
    soft = probes.knn_classify(x, many, query, k=5, temperature=temperature)
    for row, point in enumerate(query):
        cosine = [float(torch.dot(point, other) / point.norm() / other.norm()) for other in x]
        nearest = sorted(range(20), key=lambda i: -cosine[i])[:5]
        weight = {i: 1.0 if temperature is None else math.exp(cosine[i] / temperature) for i in nearest}
        assert found[row].tolist() == pytest.approx([sum(w for i, w in weight.items() if y[i] == c) for c in range(3)], rel=1e-4)
        mean = sum(w * many[i].float() for i, w in weight.items()) / sum(weight.values())
        assert soft[row].tolist() == pytest.approx(mean.tolist(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("backend", "largest"), [("auto", 2**25), ("torch", 2**25), ("torch", 80)])
def test_kmeans_finds_the_best_of_all_partitions(backend, largest, monkeypatch):
    monkeypatch.setattr(probes, "LARGEST", largest)  # 80: two rows at a time
    x = torch.randn(9, 2) + 5
    found = probes.kmeans(x, 2, restarts=20, backend=backend, tolerance=0)
    best = math.inf
    for names in itertools.product(range(2), repeat=9):
        part = torch.tensor(names)
        if part.unique().numel() == 2:
            best = min(best, sum(float((x[part == c] - x[part == c].mean(0)).square().sum()) for c in range(2)))
    assert found.inertia == pytest.approx(best, rel=1e-4)
    for c in range(2):
        torch.testing.assert_close(found.centres[c], x[found.labels == c].mean(0))
    again = probes.kmeans(x, 2, restarts=20, backend=backend, tolerance=0)
    assert torch.equal(found.labels, again.labels)


def test_kmeans_torch_survives_fewer_distinct_points_than_clusters():
    x = torch.tensor([[0.0, 1.0], [0.0, 1.0], [2.0, 0.0], [2.0, 0.0]])
    found = probes.kmeans(x, 3, restarts=2, backend="torch", max_iter=5)
    assert found.inertia == pytest.approx(0, abs=1e-6)
    assert found.centres.isfinite().all()


def test_cluster_scores_against_all_assignments():
    truth = np.array([1, 1, 1, 2, 2, 3, 3, 3, 3])
    for clusters in ([7, 7, 5, 5, 5, 9, 9, 9, 7], [0, 1, 2, 3, 4, 4, 4, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1, 1]):
        clusters = np.array(clusters)
        ids, best = np.unique(clusters), 0.0
        for names in itertools.permutations([1, 2, 3, -1, -1, -1, -1], len(ids)):
            mapped = np.array([dict(zip(ids, names, strict=True))[c] for c in clusters])
            best = max(best, (mapped == truth).mean())
        named = probes.match_clusters(truth, clusters)
        scores = probes.cluster_scores(truth, torch.from_numpy(clusters))
        assert probes.cluster_accuracy(truth, clusters) == best == scores["accuracy"] == (named == truth).mean()
        f1 = [2 * ((named == c) & (truth == c)).sum() / ((named == c).sum() + (truth == c).sum()) for c in (1, 2, 3)]
        assert scores["macro_f1"] == pytest.approx(np.mean(f1))
    assert (probes.match_clusters(truth, [0, 1, 2, 3, 4, 4, 4, 0, 0]) == -1).any()


def test_nmi_and_ari_by_their_definitions():
    a, b = np.array([0, 0, 1, 1, 1, 2, 2, 0]), np.array([1, 1, 1, 0, 0, 2, 2, 2])
    joint = np.histogram2d(a, b, bins=3)[0] / 8
    pa, pb = joint.sum(1), joint.sum(0)
    information = sum(joint[i, j] * math.log(joint[i, j] / pa[i] / pb[j]) for i in range(3) for j in range(3) if joint[i, j])
    entropies = [-sum(p * math.log(p) for p in q) for q in (pa, pb)]
    assert probes.nmi(a, b) == pytest.approx(information / np.mean(entropies))
    pairs = list(itertools.combinations(range(8), 2))
    same = np.array([[a[i] == a[j], b[i] == b[j]] for i, j in pairs])
    both, in_a, in_b = (same.all(1).sum(), *same.sum(0))
    chance = in_a * in_b / len(pairs)
    assert probes.ari(a, b) == pytest.approx((both - chance) / ((in_a + in_b) / 2 - chance))


# -- support vector machine


def test_svm_kfold_chooses_the_penalty_inside_the_training_folds():
    x, y = blobs(60, noise=4)
    found = probes.svm_kfold(x, y, folds=4, penalties=(0.01, 1), inner_folds=3)
    expected = []
    for train, test in StratifiedKFold(4, shuffle=True, random_state=0).split(x, y):
        means = []
        for penalty in (0.01, 1):
            inner = [
                sklearn.svm.SVC(C=penalty).fit(x[train][a], y[train][a]).score(x[train][b], y[train][b])
                for a, b in StratifiedKFold(3).split(x[train], y[train])
            ]
            means.append(np.mean(inner))
        machine = sklearn.svm.SVC(C=(0.01, 1)[int(np.argmax(means))]).fit(x[train], y[train])
        expected.append(machine.score(x[test], y[test]))
    np.testing.assert_allclose(found, expected)
    assert probes.svm_kfold(x, y, folds=4, penalties=(1,), kernel="linear").shape == (4,)


# -- metrics


def test_summary():
    summary = probes.summarise([80.0, 84.0, torch.tensor(82.0)])
    assert summary == (82.0, pytest.approx(math.sqrt(8 / 3)), 3)
    assert str(summary) == "82.00 ± 1.63 (n=3)"


def test_class_metrics_by_hand():
    truth, guess = torch.tensor([0, 0, 0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 1, 0, 3])
    assert probes.accuracy(truth, guess) == pytest.approx(4 / 7)
    assert probes.balanced_accuracy(truth, guess) == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert probes.macro_f1(truth, guess) == pytest.approx((6 / 8 + 2 / 4 + 0 + 0) / 4)
    assert probes.macro_f1(truth, guess, classes=[0, 1]) == pytest.approx((6 / 8 + 2 / 4) / 2)
    assert probes.micro_f1([[1, 0], [1, 1]], [[1, 1], [0, 1]]) == pytest.approx(2 * 2 / (3 + 3))
    assert probes.micro_f1(np.zeros((2, 2)), np.zeros((2, 2))) == 0


def test_roc_auc_counts_pairs_and_leaves_missing_rows_and_one_class_tasks_out():
    score = torch.randint(0, 5, (30, 3))  # ties
    label = (torch.rand(30, 3) < 0.4).long()
    label[:, 2] = 0
    present = torch.rand(30, 3) < 0.7
    values = probes.roc_auc_per_task(label, score, present=present)
    for task in range(2):
        rows = present[:, task]
        positive, negative = (score[rows & (label[:, task] == c), task].tolist() for c in (1, 0))
        wins = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
        assert values[task] == pytest.approx(wins / len(positive) / len(negative))
    assert np.isnan(values[2])
    assert probes.roc_auc(label, score, present=present) == pytest.approx(values[:2].mean())
    assert probes.roc_auc(torch.tensor([1, -1, -1]), torch.tensor([0.5, 0.1, 0.7])) == 0.5


def test_average_precision_by_its_sum():
    label, score = np.array([1, 0, 1, 1, 0]), np.array([0.9, 0.8, 0.7, 0.2, 0.1])
    assert probes.average_precision(label, score) == pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 3)
    assert probes.average_precision(label, np.zeros(5)) == pytest.approx(3 / 5)  # equal scores are one step
    table = np.stack([label, 1 - label, np.zeros(5)], 1)
    scores = np.stack([score, score, score], 1)
    macro = (probes.average_precision(label, score) + probes.average_precision(1 - label, score)) / 2
    assert probes.mean_average_precision(table, scores) == pytest.approx(macro)
    assert probes.mean_average_precision(table, scores, "micro") == pytest.approx(probes.average_precision(table.ravel(), scores.ravel()))


# -- bad input

X, Y = blobs(12)
MANY = torch.zeros(12, 3, dtype=torch.long)
SGD = {"epochs": 1, "lr": 0.1}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: probes.linear_probe_sgd((X, MANY), None, (X, Y), **SGD), "train labels.*multi-label mode"),
        (lambda: probes.linear_probe_sgd((X, Y), None, (X, Y), multi_label=True, **SGD), "multi-label mode expects"),
        (lambda: probes.linear_probe_sgd((X, MANY + 2), None, (X, MANY), multi_label=True, **SGD), "0 and 1 only"),
        (lambda: probes.linear_probe_sgd((X, MANY), None, (X, MANY[:, :2]), multi_label=True, **SGD), "number of labels"),
        (lambda: probes.linear_probe_sgd((X, MANY), None, (X, MANY), multi_label=True, classes=5, **SGD), "5 columns"),
        (lambda: probes.linear_probe_sgd((X, Y), None, (X, Y), classes=2, **SGD), "0 to 1, found 0 to 2"),
        (lambda: probes.linear_probe_sgd((X, Y - 1), None, (X, Y), **SGD), "found -1 to 1"),
        (lambda: probes.linear_probe_sgd((X, Y.float()), None, (X, Y), **SGD), "class numbers"),
        (lambda: probes.linear_probe_sgd((X, Y[:5]), None, (X, Y), **SGD), r"\(12,\)"),
        (lambda: probes.linear_probe_sgd((X, Y), None, (X[:, :2], Y), **SGD), "one feature width"),
        (lambda: probes.linear_probe_sgd((X / 0, Y), None, (X, Y), **SGD), "finite.* 12 rows"),
        (lambda: probes.linear_probe_sgd((X[0], Y), None, (X, Y), **SGD), "floating-point"),
        (lambda: probes.linear_probe_sgd((X, Y), None, (X, Y), epochs=0, lr=0.1), "epochs"),
        (lambda: probes.linear_probe_sgd([(X, Y)] * 2, None, (X, Y), batch_size=3, **SGD), "2 pairs"),
        (lambda: probes.linear_probe_sgd((X, Y), None, (X, Y), optimizer="lamb", **SGD), "lamb"),
        (lambda: probes.knn_classify(X, Y, X, k=13), "k=13"),
        (lambda: probes.knn_classify(X, Y, X, k=3, temperature=0), "temperature"),
        (lambda: probes.kmeans(X, 13), "1 to 12"),
        (lambda: probes.svm_kfold(X, Y), "at least 10 samples"),
        (lambda: probes.svm_kfold(X, Y[:5]), r"\(5,\)"),
        (lambda: probes.svm_kfold(X / 0, Y, folds=2), "NaN"),
        (lambda: probes.summarise([]), "at least one"),
        (lambda: probes.accuracy([1, 2], [1]), "one length"),
        (lambda: probes.micro_f1([1, 0], [1, 0]), "one shape"),
        (lambda: probes.roc_auc(np.ones((3, 2)), np.ones((3, 1))), "one shape"),
        (lambda: probes.roc_auc([1, 0], [np.nan, 1]), "NaN"),
        (lambda: probes.roc_auc([1, 1], [0.5, 1]), "at least one task"),
        (lambda: probes.average_precision([0, 0], [0.5, 1]), "at least one positive"),
        (lambda: probes.average_precision([[1]], [[1]]), "one length"),
        (lambda: probes.mean_average_precision([1], [1]), "one shape"),
        (lambda: probes.mean_average_precision([[0]], [[1]]), "at least one positive"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
