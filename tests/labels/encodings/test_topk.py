from relabel_datasets.labels.encodings import encode_logits

from ..samples import HEIGHT, NUM_CLASSES, WIDTH, random_dense


def test_topk_keeps_the_best_classes_of_each_location_best_first():
    dense = random_dense()
    encoded = encode_logits(dense[None], "topk")
    classes = encoded.tensors["classes"]
    assert encoded.tensors.keys() == {"logits", "classes"}
    for y in range(HEIGHT):
        for x in range(WIDTH):
            best = sorted(range(NUM_CLASSES), key=lambda c: -dense[c, y, x])[:5]
            assert classes[0, :, y, x].tolist() == best
            assert encoded.logits[0, :, y, x].tolist() == dense[best, y, x].tolist()
