from common import *


def test_the_gap_of_a_model_to_itself_is_0_and_of_a_random_embedder_about_1(tiny):
    z, y = torch.randn(16, 4, 8, 8), torch.arange(16) % 8
    assert layer_gap(tiny, tiny, z, z, y) == [0, 0, 0, 0]
    same = layer_gap(tiny, tiny, z, z, y, t=0.5)                     # each with noise of its own
    assert all(0.1 < g < 2 for g in same)
    other = to_deep_model(tiny, TINY_DIT)
    other.x_embedder.proj.weight.copy_(scramble(DiT(TINY_DIT), seed=7).x_embedder.proj.weight)
    assert layer_gap(other, tiny, z, z, y)[0] > 0.9
    half = to_deep_model(tiny, replace(TINY_DIT, patch_size=1))             # on half the grid
    gaps = layer_gap(half, tiny, F.avg_pool2d(z, 4), z, y)
    assert len(gaps) == 4 and all(g > 0.5 for g in gaps)
    half.embed = lambda _: F.avg_pool2d(tiny.embed(z).transpose(1, 2).unflatten(2, (4, 4)), 2).flatten(2).transpose(1, 2)
    assert layer_gap(half, tiny, F.avg_pool2d(z, 4), z, y)[0] < 1e-6  # what stage 1 aims at
    table = gap_table({"base": [0.0] * 4, "new": gaps}).splitlines()
    assert len(table) == 6 and table[1].startswith("embedder") and table[4].startswith("block 3") and f"{sum(gaps) / 4:.3f}" in table[5]


def test_the_gap_of_the_average_feature_is_1(tiny):
    z, y = torch.randn(64, 4, 8, 8), torch.zeros(64, dtype=torch.long)
    flat = to_deep_model(tiny, TINY_DIT)
    flat.x_embedder.proj.weight.zero_()
    mean = tiny.embed(z).mean(dim=(0, 1))
    flat.x_embedder.proj.bias.copy_(mean)
    flat.embed = lambda z: mean.expand(len(z), 16, -1)
    assert layer_gap(flat, tiny, z, z, y)[0] == pytest.approx(1, abs=1e-4)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(20000, 3, generator=g, dtype=torch.float64)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T))).T                    # mean 0, covariance 1, exactly
    b = a * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([1.0, 0.0, -2.0])
    assert abs(frechet_distance(a, a)) < 1e-8
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 0.25, abs=1e-6) == frechet_distance(b, a)   # |m|^2 + sum (s - 1)^2
    turn = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))[0]
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(6.25, abs=1e-6)
    few = torch.randn(10, 64, generator=g)                           # fewer pictures than features
    assert abs(frechet_distance(few, few)) < 1e-3


def test_inception_score_is_1_without_variety_and_the_number_of_classes_at_best():
    assert inception_score(torch.zeros(40, 8)) == pytest.approx(1)
    assert inception_score(100 * F.one_hot(torch.arange(40) % 8, 8).float()) == pytest.approx(8)
    assert inception_score(100 * F.one_hot(torch.zeros(40, dtype=torch.long), 8).float()) == pytest.approx(1)       # sure, and all the same


def test_the_shipped_judge_knows_unseen_shapes_and_not_noise():
    judge, val = load_classifier(), ShapesSource(128, split="val")
    assert judge.classes == SHAPES
    f, y = judged_source(judge, val, 400)
    assert f.shape == (400, 128) and set(y.tolist()) == set(range(8)) and share_right(judge, f, y) > 0.95
    images, y = val.batch(torch.arange(80))
    assert accuracy(judge, images, y) > 0.95 and accuracy(judge, torch.rand(80, 3, 64, 64) * 2 - 1, y) < 0.4


def test_a_file_that_is_no_judge_is_one_clear_error(tmp_path):
    write_tensors(tmp_path / "w.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="w.safetensors is not a classifier"):
        load_classifier(str(tmp_path / "w.safetensors"))
    with pytest.raises(ValueError, match="no such file"):
        load_classifier(str(tmp_path / "gone.safetensors"))
    with pytest.raises(ValueError, match="write over the shipped judge"):
        evaluate.main(["--train-classifier", "--images", str(tmp_path)])


def test_evaluate_compares_the_newest_runs_and_says_how_to_make_the_missing(tiny, capsys, monkeypatch):
    write_run("align-test-1", deep(tiny, 1), trained_part, steps=400)
    write_run("finetune-test-1", scramble(DiT(DEEP), seed=2), lambda k: True, kind="finetune", steps=1600)
    evaluate.main(["--base", "test", *QUICK])
    rows, said = table_of(capsys.readouterr().out)
    assert said[0] == "no noalign run of test yet: python finetune.py --init base --train-steps 1600 --base test"
    assert list(rows) == ["real pictures", "base test", "align-test-1", "finetune-test-1"]
    assert rows["real pictures"]["accuracy"] > 0.9 and rows["base test"]["tokens"] == 16 and rows["align-test-1"]["tokens"] == 4
    assert rows["real pictures"]["frechet"] < rows["base test"]["frechet"] and "gap" not in rows["base test"] and rows["align-test-1"]["gap"] > 0.5
    assert rows["finetune-test-1"]["steps"] == "1600"
    protocol = next(line for line in said if line.startswith("["))
    for fact in ("N 16", "euler 1 steps", "guidance 3,", "shipped classifier", "2048 real pictures", "64 procedural pictures, 64 px", "float32"):
        assert fact in protocol, fact
    evaluate.main(["runs/finetune-test-1", *QUICK])                   # its base is written in it
    assert list(table_of(capsys.readouterr().out)[0]) == ["real pictures", "base test", "finetune-test-1"]


def test_evaluate_leaves_out_what_its_judge_cannot_judge(tiny, capsys, monkeypatch):
    for name in ("cat", "dog"):
        flat_folder(Path("pictures") / name, 30, text=False)
    write_run("align-test-1", deep(tiny, 1), trained_part, images="pictures", classes=["cat", "dog"])
    evaluate.main(["--base", "test", *QUICK])
    rows, said = table_of(capsys.readouterr().out)
    assert list(rows) == ["base test", "align-test-1"] and "accuracy" not in rows["align-test-1"] and rows["align-test-1"]["gap"] > 0.5
    assert said[-2].startswith("no scores, no Frechet distance: the shipped classifier knows the procedural pictures only; train one: python evaluate.py --train-classifier --images pictures")
    assert "3 pictures of pictures" in "".join(said)
    # a judge of these classes, for a base of eight: the number differs
    judge = Classifier(2)
    write_tensors("judge.safetensors", judge.state_dict(), dict(classes=["cat", "dog"]))
    evaluate.main(["--base", "test", "--classifier", "judge.safetensors", *QUICK])
    rows, said = table_of(capsys.readouterr().out)
    assert "accuracy" in rows["real pictures"] and "accuracy" not in rows["align-test-1"]
    assert "align-test-1: no scores, no Frechet distance: the classifier knows 2 classes, the model 8" in said
    # eight classes of other names
    write_tensors("judge.safetensors", Classifier(8).state_dict(), dict(classes=list("abcdefgh")))
    evaluate.main(["--base", "test", "--classifier", "judge.safetensors", *QUICK])
    assert "the classifier knows a, b, c ..., the pictures are cat, dog ..." in capsys.readouterr().out
    assert evaluate.unfit(load_classifier("judge.safetensors"), {}, 8) and not evaluate.unfit(load_classifier(), {}, 8)
    assert evaluate.unfit(load_classifier(), {"classes": list("abcdefgh")}, 8)


def test_a_judge_can_be_trained(tmp_path, capsys):
    for level, name in ((40, "dark"), (220, "light")):
        for i in range(20):
            save(np.full((8, 8, 3), level + i, np.uint8), tmp_path / "pictures" / name / f"{i}.png")
    source = ImageFolder(tmp_path / "pictures", 64)
    score = evaluate.train_classifier(str(tmp_path / "j.safetensors"), source, source, steps=12, batch=8)
    judge = load_classifier(str(tmp_path / "j.safetensors"))
    assert judge.classes == ("dark", "light") and f"{score:.1%}" in capsys.readouterr().out and score > 0.9


def test_fid_of_a_folder_with_itself_is_0_and_the_protocol_is_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", SimpleNamespace(FeatureExtractorInceptionV3=FakeInception))
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    folder = str(flat_folder(tmp_path / "a", 30, text=False))        # samples have no captions
    evaluate.main(["--fid", folder, "--reference", folder, "--res", "16", "--device", "cpu"])
    said = capsys.readouterr().out
    assert re.match(r"FID -?0\.000, Inception score \d+\.\d\d   \[N 30, reference .* of 30, inception-v3-compat of torch-fidelity, 16 px centre squares, bytes\]", said)
    (tmp_path / "a/000.png").write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 30 pictures are broken"):
        evaluate.main(["--fid", folder, "--reference", folder, "--res", "16"])
    with pytest.raises(ValueError, match="needs --reference"):
        evaluate.main(["--fid", folder])


def test_inception_that_cannot_be_had_is_one_clear_error(tmp_path, monkeypatch):
    ask = lambda *more: evaluate.main(["--fid", "a", "--reference", "b", *more])
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)         # not installed
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        ask()
    with pytest.raises(ValueError, match="--inception gone.pth: no such file"):
        ask("--inception", "gone.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", SimpleNamespace(FeatureExtractorInceptionV3=FakeInception))
    (tmp_path / "wrong.pth").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="the Inception weights in .*wrong.pth do not fit .*weights-inception-2015-12-05-6726825d.pth"):
        ask("--inception", str(tmp_path / "wrong.pth"))
