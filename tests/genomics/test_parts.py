"""The parts of `titans dna`: scores by hand, batches that repeat, counts as defined, models."""

import math

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from pytitans.data.dna import EOS_ID, PAD_ID, encode_bases, reverse_complement, stored_bases
from pytitans.data.dna_sets import Labelled
from pytitans.data.windows import TokenText
from pytitans.genomics.batches import DrawnSequences, DrawnStrands, OrderedSequences, collate
from pytitans.genomics.cnn import GenomicCNN, GenomicCNNConfig
from pytitans.genomics.counts import ContextMixture, ContextModel
from pytitans.genomics.genome import genome_bits
from pytitans.genomics.models import CLASSIFIERS, build, classifier_config, count_parameters
from pytitans.genomics.predict import embed_fasta, embed_sequences, predict
from pytitans.genomics.scores import average_strands, scores
from pytitans.genomics.train import split_genome
from pytitans.models import TitansConfig, TitansForSequenceClassification

RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(4, size=n).astype(np.uint8) for n in (5, 9, 30, 12, 7, 9)]
ROWS = Labelled(SEQUENCES, np.array([0, 1, 0, 1, 1, 0]))
GENOME = "".join(RNG.choice(list("ACGTacgtN"), size=700, p=[0.24] * 4 + [0.008] * 4 + [0.008]))


def test_matthews_of_two_classes_is_the_textbook_formula():
    probabilities, labels = RNG.random((200, 2)), RNG.integers(2, size=200)
    said = probabilities[:, 1] > probabilities[:, 0]
    tp, fn = (said & (labels == 1)).sum(), (~said & (labels == 1)).sum()
    fp, tn = (said & (labels == 0)).sum(), (~said & (labels == 0)).sum()
    by_hand = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    found = scores(probabilities, labels)
    assert found["mcc"] == pytest.approx(by_hand)
    assert found["accuracy"] == pytest.approx((tp + tn) / 200)


def test_matthews_of_several_classes_is_the_correlation_of_indicators():
    labels, said = RNG.integers(4, size=300), RNG.integers(4, size=300)
    x, y = np.eye(4)[said], np.eye(4)[labels]
    x, y = x - x.mean(0), y - y.mean(0)
    expected = (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
    assert scores(np.eye(4)[said], labels)["mcc"] == pytest.approx(expected)


def test_one_class_always_said_scores_zero():
    assert scores(np.array([[1.0, 0.0]] * 4), np.array([0, 1, 0, 1])) == {
        "mcc": 0.0,
        "accuracy": 0.5,
    }


def test_every_sequence_comes_once_before_any_comes_again():
    drawn = DrawnSequences(ROWS, 18, seed=3, augment=False)
    items = [drawn[i] for i in range(18)]
    for epoch in range(3):
        lengths = [len(ids) for ids, _ in items[6 * epoch : 6 * epoch + 6]]
        assert sorted(lengths) == sorted(map(len, SEQUENCES))
    assert [len(x) for x, _ in items[:6]] != [len(x) for x, _ in items[6:12]]
    jumped = DrawnSequences(ROWS, 18, seed=3, augment=False)[13]  # alone, as in a resumed run
    assert np.array_equal(jumped[0], items[13][0]) and jumped[1] == items[13][1]


def test_augmentation_draws_each_strand_half_of_the_time():
    plain, drawn = (DrawnSequences(ROWS, 600, 0, augment) for augment in (False, True))
    other = 0
    for i in range(600):
        (before, label), (after, same_label) = plain[i], drawn[i]
        assert label == same_label
        if not np.array_equal(before, after):
            assert np.array_equal(reverse_complement(before), after)
            other += 1
    assert 250 < other < 350


def test_strands_of_a_genome_keep_the_eos_before_a_record():
    ids = np.array([EOS_ID, 0, 0, 0, 1, 1, 1], dtype=np.uint8)
    drawn = DrawnStrands(TokenText([ids], EOS_ID, 6, 6), 7, 50, seed=0)
    found = {tuple(drawn[i]["input_ids"].tolist()) for i in range(50)}
    assert found == {(5, 0, 0, 0, 1, 1, 1), (5, 2, 2, 2, 3, 3, 3)}


def test_batches_are_padded_on_the_right():
    batch = collate([(SEQUENCES[0], 1), (SEQUENCES[1], 0)])
    assert batch["input_ids"].shape == (2, 9) and batch["labels"].tolist() == [1, 0]
    assert batch["input_ids"][0, 5:].tolist() == [PAD_ID] * 4
    assert batch["attention_mask"].sum(1).tolist() == [5, 9]


def by_hand(ids, order, pseudo):
    """P of each base, by counting all that came before it."""
    result = []
    for t, base in enumerate(ids):
        context = ids[max(0, t - order) : t]
        if base > 3 or len(context) < order or any(x > 3 for x in context):
            result.append(0.25)
            continue
        places = [s for s in range(order, t) if ids[s - order : s] == context and ids[s] < 4]
        same = sum(ids[s] == base for s in places)
        result.append((same + pseudo) / (len(places) + 4 * pseudo))
    return result


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("cut", [1, 50, 300])
def test_counts_are_of_what_came_before(order, cut):
    ids = encode_bases(GENOME[:300])
    model = ContextModel(order)
    found = np.concatenate([model.probabilities(ids[i : i + cut]) for i in range(0, 300, cut)])
    np.testing.assert_allclose(found, by_hand(ids.tolist(), order, 1.0))


def test_a_context_gives_probabilities_of_four_bases():
    model = ContextModel(2)
    model.probabilities(encode_bases(GENOME))
    tail = model.tail.copy()
    each = []
    for base in range(4):
        model.tail, counts = tail, model.counts.copy()
        each.append(model.probabilities(np.array([base], dtype=np.uint8))[0])
        model.counts = counts
    assert sum(each) == pytest.approx(1)


def test_a_mixture_is_near_its_best_order():
    repeated = encode_bases(GENOME[:64].replace("N", "A").upper() * 30)
    random = RNG.integers(4, size=2000).astype(np.uint8)
    mixture = ContextMixture((1, 6))
    low, high, mixed = mixture.bits(np.concatenate([random, repeated]))
    assert mixed[-500:].mean() < 0.3 < 1.5 < low[-500:].mean()
    assert mixed[500:2000].mean() < high[500:2000].mean() + 0.05


def write_genome(path, parts):
    path.write_text("".join(f">r{i}\n{part}\n" for i, part in enumerate(parts)))
    return str(path)


@pytest.mark.parametrize("piece", [7, 64, 10**6])
def test_bits_are_those_of_one_call_over_all_records(tmp_path, piece):
    parts = [GENOME[:40], GENOME[40:240], GENOME[240:300]]
    path = write_genome(tmp_path / "a.fa", parts)
    model = tiny_model("mal", vocab_size=7)
    found = genome_bits(model, [path], piece=piece, orders=(1,), seen=True, progress=False)
    ids = np.concatenate([np.insert(encode_bases(part), 0, EOS_ID) for part in parts])
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    logits = model(tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
    bits = -logits.gather(1, tokens[0, 1:, None])[:, 0].detach().numpy() / math.log(2)
    bits = np.insert(bits, 0, 0.0)
    known, place = ids < 4, np.arange(len(ids))
    borders = {"train": (0, 0.8), "dev": (0.8, 0.9), "test": (0.9, 1)}
    for name, (begin, end) in borders.items():
        inside = (place >= round(begin * len(ids))) & (place < round(end * len(ids))) & known
        assert found["parts"][name]["bases"] == inside.sum()
        assert found["parts"][name]["model"] == pytest.approx(bits[inside].mean(), abs=1e-5)
    assert found["bases"] == known.sum() == sum(row["bases"] for row in found["bins"])
    streams = stored_bases(path)
    split = [np.concatenate(part) for part in split_genome(streams)]
    ends = np.cumsum([len(x) for x in split]).tolist()
    assert ends == [round(share * len(ids)) for share in (0.8, 0.9, 1)]
    assert np.array_equal(np.concatenate(split), ids)


def test_full_attention_reads_a_genome_in_windows(tmp_path):
    path = write_genome(tmp_path / "a.fa", [GENOME[:200]])
    config = LlamaConfig(
        vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="--window"):
        genome_bits(model, [path], progress=False)
    found = genome_bits(model, [path], window=32, progress=False)
    assert found["window"] == 32 and found["parts"]["whole"]["model"] == pytest.approx(2.8, abs=0.2)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_do_not_depend_on_pieces_or_neighbours(tmp_path, pooling):
    parts = [GENOME[:30], GENOME[30:200], GENOME[200:205], GENOME[205:237], GENOME[237:400]]
    path = write_genome(tmp_path / "a.fa", parts)
    model = tiny_model("mag", vocab_size=7, pad_token_id=6)
    alone = []
    for part in parts:
        ids = torch.from_numpy(encode_bases(part).astype(np.int64))[None]
        hidden = model.model(ids, use_cache=False).last_hidden_state[0]
        alone.append((hidden.mean(0) if pooling == "mean" else hidden[-1]).detach().numpy())
    for piece, size in ((32, 2), (1000, 3)):
        names, found = embed_fasta(
            model, path, pooling=pooling, piece=piece, batch_size=size, progress=False
        )
        assert names == [f"r{i}" for i in range(5)]
        np.testing.assert_allclose(found, alone, atol=1e-5)
    found = embed_sequences(
        model, [encode_bases(x) for x in parts], pooling=pooling, batch_size=2, progress=False
    )
    np.testing.assert_allclose(found, alone, atol=1e-5)


def classifier(**changes):
    torch.manual_seed(0)
    fields = {"vocab_size": 7, "pad_token_id": PAD_ID, "num_labels": 2} | changes
    return TitansForSequenceClassification(tiny_config("mal", **fields)).double().eval()


def test_predictions_are_in_order_and_of_both_strands():
    model = classifier()

    def alone(ids):
        logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits
        return logits.softmax(-1)[0].detach().numpy()

    one = np.stack([alone(x) for x in SEQUENCES])
    other = np.stack([alone(reverse_complement(x)) for x in SEQUENCES])
    found = predict(model, ROWS, batch_size=4, progress=False)
    np.testing.assert_allclose(found, one, atol=1e-6)
    found = predict(model, ROWS, both=True, batch_size=4, progress=False)
    np.testing.assert_allclose(found, (one + other) / 2, atol=1e-6)
    assert len(OrderedSequences(ROWS, True)) == 12
    assert average_strands(found, False) is found


def test_every_classifier_but_the_cnn_has_the_parameters_of_the_titans_model():
    like = TitansConfig(
        vocab_size=7, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        memory_expansion=2, pad_token_id=PAD_ID, bos_token_id=EOS_ID, eos_token_id=EOS_ID,
        variant="mal",
    )  # fmt: skip
    wanted = count_parameters(classifier_config("mal", like, ["0", "1"], 101))
    for name in set(CLASSIFIERS) - {"cnn", "mac", "mag", "lmm"}:
        found = count_parameters(classifier_config(name, like, ["0", "1"], 101))
        assert abs(found / wanted - 1) < 0.02, (name, found, wanted)
    labels = classifier_config("llama", like, ["enhancer", "other"], 101).id2label
    assert labels == {0: "enhancer", 1: "other"}
    with pytest.raises(ValueError, match="'tree' is no classifier"):
        classifier_config("tree", like, ["0", "1"], 101)


def test_the_cnn_is_that_of_genomic_benchmarks():
    model = build(GenomicCNNConfig(input_length=251, vocab_size=5))
    sizes = [100 * 5, 16 * 100 * 8 + 16, 32, 8 * 16 * 8 + 8, 16, 4 * 8 * 8 + 4, 8]
    length = 251
    for _ in range(3):
        length = (length - 7) // 2
    sizes += [4 * length * 512 + 512, 512 * 2 + 2]
    assert model.num_parameters() == sum(sizes)
    with pytest.raises(ValueError, match="input_length=40 is too short"):
        build(GenomicCNNConfig(input_length=40))


def test_the_cnn_pads_and_cuts_to_its_length():
    torch.manual_seed(0)
    model = GenomicCNN(GenomicCNNConfig(input_length=60)).eval()
    ids = torch.randint(4, (2, 70))
    torch.testing.assert_close(model(ids).logits, model(ids[:, :60]).logits)
    short = torch.nn.functional.pad(ids[:, :50], (0, 10), value=PAD_ID)
    torch.testing.assert_close(model(ids[:, :50]).logits, model(short).logits)
    mask = torch.ones(2, 60).index_fill(1, torch.arange(50, 60), 0)
    torch.testing.assert_close(model(ids[:, :60], attention_mask=mask).logits, model(short).logits)
