import relabel_datasets.train as train


def test_all_public_names_are_sorted_and_can_be_imported():
    assert train.__all__ == sorted(train.__all__, key=lambda name: (not name.isupper(), name))  # as ruff sorts them
    assert set(train.__all__) == set(train._MODULES)
    assert all(getattr(train, name) is not None for name in train.__all__)
