from common import *


def test_a_procedural_picture_depends_on_its_number_alone():
    index = torch.tensor([5, 12345, 7, 5])
    images, labels = shapes(index, 32)
    assert images.shape == (4, 3, 32, 32) and images.min() >= -1 and images.max() <= 1 and torch.equal(labels, index % 8)
    assert torch.equal(images[0], images[3]) and not torch.equal(images[0], images[2])
    for i in range(4):
        torch.testing.assert_close(shapes(index[i : i + 1], 32)[0][0], images[i])
    hues = torch.tensor([7800825, 5673155, 14137248]) / 2**24       # on every machine: caches and weights rely on it
    assert torch.equal(shape_facts(torch.arange(3))["hue"], hues)


def test_a_procedural_picture_is_the_same_at_every_resolution():
    small, large = shapes(torch.arange(16), 32)[0], shapes(torch.arange(16), 128)[0]
    assert (F.avg_pool2d(large, 4) - small).abs().mean() < 0.01


def test_training_and_validation_pictures_differ():
    train, val = ShapesSource(32), ShapesSource(32, split="val")
    assert train.identity != val.identity
    a, b = (set(zip(f["x"].tolist(), f["y"].tolist())) for f in (shape_facts(torch.arange(32768), seed) for seed in (0, 1)))
    assert len(a) == len(b) == 32768 and not a & b
    assert (train.batch(torch.arange(8))[0] - val.batch(torch.arange(8))[0]).abs().mean() > 0.1


def test_a_procedural_picture_shows_its_facts():
    """The shape is the only saturated thing in its picture; a shape's middle is its centre for those with a symmetry."""
    index = torch.arange(256)
    facts, images = shape_facts(index), (shapes(index, 96)[0] + 1) / 2
    vivid = (images.amax(1) - images.amin(1)) / images.amax(1).clamp(min=1e-3) > 0.6                  # HSV saturation
    area = vivid.float().mean(dim=(1, 2))
    at = (torch.arange(96) + 0.5) / 96
    x, y = (vivid * at).sum(dim=(1, 2)) / vivid.sum(dim=(1, 2)), (vivid * at[:, None]).sum(dim=(1, 2)) / vivid.sum(dim=(1, 2))
    even = torch.tensor([SHAPES[k] in ("circle", "square", "ring", "cross", "bars") for k in facts["label"]])
    assert (x - facts["x"])[even].abs().max() < 0.01 and (y - facts["y"])[even].abs().max() < 0.01
    assert (x - facts["x"]).abs().max() < 0.14 and (y - facts["y"]).abs().max() < 0.14
    disc = facts["label"] == SHAPES.index("circle")
    torch.testing.assert_close(area[disc], math.pi * (0.95 * facts["radius"][disc]) ** 2, rtol=0.03, atol=0)
    middle = images[torch.arange(256), :, (facts["y"] * 96).long(), (facts["x"] * 96).long()][disc]    # red, green, blue
    strongest = (6 * facts["hue"][disc]).round().long() % 6
    for rgb, k in zip(middle, strongest):
        assert rgb[[0, 0, 1, 1, 2, 2][k] if k % 2 == 0 else [0, 1, 1, 2, 2, 0][k]] > rgb.min() + 0.2


def test_a_picture_is_cropped_to_its_middle_and_turned_as_its_exif_says(tmp_path):
    from PIL import Image
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:32, 0] = 255                                          # the middle square: left half red
    save(wide, tmp_path / "wide.png")
    x = load_image(tmp_path / "wide.png", 32)
    assert x.shape == (3, 32, 32) and x[0, :, :15].min() > 0.95 and x[0, :, 17:].max() < -0.95 and x[1:].max() < -0.95
    exif = Image.Exif()
    exif[0x0112] = 6                                                 # a camera held upright: turn right by 90 degrees
    save(wide, tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    assert image_size(tmp_path / "turned.jpg") == wide.shape[1::-1] and wide.shape[0] != wide.shape[1]              # as it is seen: (H,W)
    y = load_image(tmp_path / "turned.jpg", 32)
    assert y[0, :14].min() > 0.8 and y[0, 18:].max() < -0.8


def test_every_kind_of_picture_becomes_8_bit_rgb_on_white(tmp_path):
    from PIL import Image
    half = np.zeros((8, 8, 4), np.uint8)
    half[:, :4] = (255, 0, 0, 255)                                   # opaque red; the rest is transparent black
    save(half, tmp_path / "alpha.png")
    palette = Image.fromarray((np.arange(64).reshape(8, 8) % 8 >= 4).astype(np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 0])
    save(palette, tmp_path / "palette.png", transparency=1)
    for name in ("alpha.png", "palette.png"):
        x = load_image(tmp_path / name, 8)
        assert torch.equal(x[:, :, 0], torch.tensor([1.0, -1.0, -1.0])[:, None].expand(3, 8)) and (x[:, :, 7] == 1).all(), name
    save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "cmyk.jpg", quality=100)
    torch.testing.assert_close(load_image(tmp_path / "cmyk.jpg", 8)[:, 4, 4], torch.tensor([1.0, -1.0, -1.0]), atol=0.05, rtol=0)
    save(np.full((8, 8), 51, np.uint8), tmp_path / "grey.png")
    assert (load_image(tmp_path / "grey.png", 8) == 51 / 127.5 - 1).all()
    for level in (0, 300, 16384, 65535):                             # the darkest is not taken for 8 bits
        save(np.full((8, 8), level, np.uint16), tmp_path / "deep.png")
        assert (load_image(tmp_path / "deep.png", 8) - (level / 32767.5 - 1)).abs().max() < 0.005, level


def test_folders_are_classes(tmp_path):
    for name, n in (("cat", 3), ("dog", 2), ("birds/owl", 1)):
        flat_folder(tmp_path / name, n, text=False)
    source = ImageFolder(tmp_path, 8)
    assert source.classes == ("birds/owl", "cat", "dog") and source.labels.tolist() == [0, 1, 1, 1, 2, 2] and len(source) == 6
    x, y = source.batch(torch.tensor([4, 1, 5]))
    assert x.shape == (3, 3, 8, 8) and y.tolist() == [2, 1, 2] and torch.equal(x[0], torch.full((3, 8, 8), -1.0))
    save(np.zeros((8, 8, 3), np.uint8), tmp_path / "stray.png")
    with pytest.raises(ValueError, match="stray.png lies beside class folders"):
        ImageFolder(tmp_path, 8)


def test_folders_named_by_numbers_are_those_classes(tmp_path):
    """A part of ImageNet: its classes are those that the base knows by these numbers, not the first ones."""
    for name, n in (("0207", 2), ("9", 1), ("0360", 1)):
        flat_folder(tmp_path / name, n, text=False)
    source = ImageFolder(tmp_path, 8)
    assert len(source.classes) == 361 and source.classes[207] == "207" and source.labels.tolist() == [207, 207, 360, 9]
    (tmp_path / "9").rename(tmp_path / "nine")
    named = ImageFolder(tmp_path, 8)
    assert named.classes == ("0207", "0360", "nine") and named.labels.tolist() == [0, 0, 1, 2]
    flat_folder(tmp_path / "photos/20240131", 2, text=False)
    assert ImageFolder(tmp_path / "photos", 8).classes == ("20240131",)     # a date, not one of twenty million classes


def test_a_flat_folder_has_captions_and_a_missing_one_is_named(tmp_path):
    source = ImageFolder(flat_folder(tmp_path, 40), 8, captions="txt")
    assert source.caption(3) == "a picture, grey 3" and source.classes == () and source.labels.tolist() == [*range(40)]
    train, val = open_source(str(tmp_path), 8), open_source(str(tmp_path), 8, "val")
    assert [p.name for p in val.files] == ["019.png", "039.png"] and len(train) == 38 and not set(train.files) & set(val.files)
    assert len({s.identity for s in (source, train, val, ImageFolder(tmp_path, 16))}) == 4
    (tmp_path / "007.txt").unlink()
    with pytest.raises(ValueError, match="007.png has no caption"):
        ImageFolder(tmp_path, 8, captions="txt")
    assert len(ImageFolder(tmp_path, 8)) == 40                       # where nobody asks for captions it needs none


def test_linked_class_folders_are_followed(tmp_path):
    flat_folder(tmp_path / "elsewhere", 3, text=False)
    (tmp_path / "all").mkdir()
    (tmp_path / "all/cat").symlink_to(tmp_path / "elsewhere")
    source = ImageFolder(tmp_path / "all", 16)
    assert len(source) == 3 and source.classes == ("cat",)


def test_broken_pictures_are_listed_and_left_out_up_to_a_limit(tmp_path, capsys):
    flat_folder(tmp_path, 40)
    (tmp_path / "004.png").write_bytes(b"")
    source = ImageFolder(tmp_path, 8)
    assert len(source) == 39 and [p.name for p in source.broken] == ["004.png"] and "004.png" in capsys.readouterr().out
    (tmp_path / "005.png").write_bytes(b"not a picture")
    assert len(ImageFolder(tmp_path, 8)) == 38
    (tmp_path / "006.png").write_bytes((tmp_path / "007.png").read_bytes()[:-40])
    with pytest.raises(ValueError, match="3 of 40 pictures are broken, more than 5%.*006.png"):
        ImageFolder(tmp_path, 8)


def test_a_folder_without_enough_pictures_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        open_source(str(tmp_path / "gone"), 8)
    with pytest.raises(ValueError, match="no pictures in it"):
        open_source(str(tmp_path), 8)
    with pytest.raises(ValueError, match="fewer than 20"):
        open_source(str(flat_folder(tmp_path, 19)), 8, "val")


def test_a_picture_that_opens_but_does_not_decode_gives_its_place_to_the_next(tmp_path, capsys):
    """Half a JPEG passes Pillow's verify(); without this, hours of encoding end at it."""
    flat_folder(tmp_path, 60)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for i in (10, 11):
        save(noise, tmp_path / f"{i:03d}a.jpg")
        (tmp_path / f"{i:03d}a.txt").write_text("broken")
        (tmp_path / f"{i:03d}a.jpg").write_bytes((tmp_path / f"{i:03d}a.jpg").read_bytes()[:2000])
    source = ImageFolder(tmp_path, 8)
    where = [p.name for p in source.files].index("010a.jpg")
    assert not source.broken
    x, shown = source.batch(torch.arange(where - 1, where + 2))
    assert torch.equal(x[1], x[2]) and not torch.equal(x[0], x[1]) and [p.name for p in source.broken] == ["010a.jpg"]
    assert [source.caption(i) for i in shown[1:]] == ["a picture, grey 11"] * 2
    for source in (source, ImageFolder(tmp_path, 8)):                # filled, and found filled by one that has not met the broken picture
        cache = LatentCache(tmp_path / "cache", source, [averages(4, 2)])
        assert len(cache) == 62 and cache.captions()[where] == cache.captions()[where + 1] == "a picture, grey 11"
    assert "010a.jpg" in capsys.readouterr().out
    strict = ImageFolder(tmp_path, 8, max_broken=0)
    with pytest.raises(ValueError, match="1 of 62 pictures are broken.*010a.jpg"):
        strict.batch(torch.arange(len(strict)))


def test_the_order_of_a_run_is_a_function_of_the_step_and_every_epoch_a_permutation():
    steps = [order(k, 6, 20, seed=3) for k in range(20)]             # 120 pictures: 6 epochs of 20, edges inside batches
    epochs = torch.cat(steps).view(6, 20)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(20).expand(6, 20)) and len(epochs.unique(dim=0)) == 6
    for k in (3, 19, 7):                                             # asked again, alone, in any order
        assert torch.equal(order(k, 6, 20, seed=3), steps[k])
    assert torch.equal(torch.cat([order(k, 12, 20, seed=3) for k in range(10)]), epochs.flatten())
    assert not torch.equal(order(0, 6, 20, seed=4), steps[0])
    assert order(1, 50, 20, seed=0).shape == (50,)                   # a batch of several epochs


def test_both_autoencoders_see_the_very_same_pixels(tmp_path):
    """Two independent flips or crops leave a finite loss and a ruined alignment."""
    cache = LatentCache(tmp_path, ShapesSource(32), [posterior(4), averages(16)], n=48, flip=True)
    z, y = cache.batch(torch.arange(len(cache)))
    old, new = F.avg_pool2d(z["posterior-f4"], 4), z["averages-f16"]
    assert len(cache) == 96 and correlation(old, new).min() > 0.999 and (old - new).abs().max() < 0.01
    assert torch.equal(y[:48], y[48:]) and torch.equal(new[:48].flip(-1), new[48:]) and not torch.equal(new[:48], new[48:])
    assert correlation(old, torch.cat([new[48:], new[:48]])).mean() < 0.7              # what one flip too many would look like


@pytest.mark.parametrize("name", ["tiny-kl-f8c4", "tiny-dc-ae-f32c32"])
def test_the_cache_holds_the_latents_of_the_pictures(name, tmp_path):
    source, ae = ShapesSource(64), load_autoencoder(name)
    cache = LatentCache(tmp_path, source, [ae], n=8, flip=True)
    images, labels = source.batch(torch.arange(8))
    z, y = cache.batch(torch.tensor([3, 8 + 5]))
    close(z[name], ae.encode(torch.stack([images[3], images[5].flip(-1)])), 2e-3)      # stored in 16 bits
    assert y.tolist() == [labels[3], labels[5]]


def test_a_cache_that_was_killed_goes_on_to_the_same_bytes(tmp_path):
    ae = calibrated(TINY_KL)
    make = lambda root, source: LatentCache(tmp_path / root, source, [ae, averages(8)], n=70, flip=True, batch=1)
    straight = make("straight", Killed(16))
    with pytest.raises(KeyboardInterrupt):
        make("killed", Killed(16, 117))
    rest = Killed(16)
    resumed = make("killed", rest)
    assert rest.start - rest.left == 40                              # 100 of 140 were safe
    for file in sorted(straight.dir.glob("*.npy")):
        assert file.read_bytes() == (resumed.dir / file.name).read_bytes(), file.name
    again = Killed(16, 0)
    make("killed", again)                                            # whole: no picture is drawn


def test_the_key_of_a_cache_covers_all_that_it_holds(tmp_path):
    ae, source = calibrated(TINY_KL), ShapesSource(16)
    where = lambda source=source, ae=ae, n=4, flip=False: LatentCache(tmp_path, source, [ae], n, flip).dir
    other = calibrated(TINY_KL)
    other.decoder.conv_out.bias += 1e-3
    scaled = calibrated(TINY_KL)
    scaled.cfg = replace(scaled.cfg, scale=scaled.cfg.scale * 1.01)
    seen = [where(), where(ShapesSource(16, split="val")), where(ShapesSource(32)), where(ae=other), where(ae=scaled), where(n=5), where(flip=True)]
    assert len(set(seen)) == 7 and where() == seen[0]


def test_a_damaged_cache_is_refused_with_the_reason(tmp_path):
    ae = posterior(8)
    make = lambda: LatentCache(tmp_path, ShapesSource(16), [ae], n=64)
    cache = make()
    for name in ("posterior-f8", "posterior-f8.std", "labels"):
        file, whole = cache.dir / f"{name}.npy", (cache.dir / f"{name}.npy").read_bytes()
        for damage in (lambda: file.write_bytes(whole[:-100]), lambda: file.write_bytes(b""), file.unlink):
            damage()
            with pytest.raises(ValueError, match=f"{re.escape(name)}.npy is missing or not whole.*delete the folder"):
                make()
            file.write_bytes(whole)
        np.save(file, np.load(file)[:-1])
        with pytest.raises(ValueError, match="has 63 rows instead of 64"):
            make()
        file.write_bytes(whole)
    make()


def test_a_cache_gives_means_without_a_generator_and_draws_with_one(tmp_path):
    """Noise in the target would be learnt by nobody; a frozen draw would be learnt by heart."""
    cache, rows = LatentCache(tmp_path, ShapesSource(16), [posterior(8), averages(8)], n=8), torch.tensor([2, 7])
    g = torch.Generator().manual_seed(0)
    mean, draws = cache.batch(rows)[0], [cache.batch(rows, g)[0] for _ in range(500)]
    assert torch.equal(mean["posterior-f8"], cache.batch(rows)[0]["posterior-f8"])
    assert all(torch.equal(d["averages-f8"], mean["averages-f8"]) for d in draws)      # no posterior, no draw
    d = torch.stack([d["posterior-f8"] for d in draws])
    assert d[0].ne(d[1]).all() and (d.mean(0) - mean["posterior-f8"]).abs().max() < 5 * 0.1 / 500**0.5
    torch.testing.assert_close(d.std(0).mean(), torch.tensor(0.1), rtol=0.05, atol=0)
    both = Buckets([cache, cache])                                   # and so do caches of several sizes as one
    assert torch.equal(both.batch(rows + 8)[0]["posterior-f8"], mean["posterior-f8"]) and both.batch(rows, g)[0]["posterior-f8"].ne(mean["posterior-f8"]).all()


def test_latents_of_a_wrong_scale_are_refused_every_time(tmp_path):
    for scale in (0.3, 25.0):
        for _ in range(2):                                           # a second try must not find a cache that says it is whole
            with pytest.raises(ValueError, match=f"standard deviation.*is its scale {scale} right"):
                LatentCache(tmp_path, ShapesSource(16), [averages(8, scale)], n=8)


def test_a_folder_with_metadata_has_its_captions_where_they_are_asked_for(tmp_path):
    described_folder(tmp_path, [dict(file_name=f"{i:03d}.png", text=f"grey {i}") for i in range(24)])
    source = ImageFolder(tmp_path, 8, captions="txt")
    assert source.classes == () and [source.caption(i) for i in (0, 23)] == ["grey 0", "grey 23"]
    assert open_source(str(tmp_path), 8, "val", "txt").caption(0) == "grey 19"
    assert len(ImageFolder(tmp_path, 8)) == 24
    (tmp_path / "metadata.jsonl").rename(tmp_path / "gone")
    (tmp_path / "dataset.json").write_text("{}")
    for captions in (None, "txt"):
        with pytest.raises(ValueError, match="this data set is not finished, 24 pictures and no metadata.jsonl"):
            ImageFolder(tmp_path, 8, captions=captions)


def test_duplicates_and_broken_entries_of_a_data_set_are_named_and_left_out(tmp_path, capsys):
    entries = [dict(file_name=f"{i:03d}.png", text=f"grey {i}", seed=i) for i in range(22)]
    entries[5]["text"] = " "
    entries[7] |= dict(text="grey 6", seed=6)                        # 007 is a second drawing of 006
    described_folder(tmp_path, [*entries, dict(file_name="003.png", text="again"), "{half", dict(file_name="gone.png", text="x")])
    shutil.copy(tmp_path / "010.png", tmp_path / "011.png")
    source = ImageFolder(tmp_path, 8, max_broken=0.5, captions="txt")
    said = capsys.readouterr().out
    for why in ("005.png (its text is empty)", "007.png (the same prompt and seed as 006.png)", "metadata.jsonl:23 (a second entry for 003.png)", "metadata.jsonl:24 (not an entry",
                "gone.png (metadata.jsonl names it", "011.png (a copy of 010.png)", "022.png (no entry", "023.png (no entry"):
        assert why in said, why
    assert [p.name for p in source.files] == [f"{i:03d}.png" for i in range(22) if i not in (5, 7, 11)] and source.caption(3) == "grey 3"
    with pytest.raises(ValueError, match="of 24 pictures are broken, more than 5%"):
        ImageFolder(tmp_path, 8, captions="txt")


def test_a_bucket_has_pictures_of_its_own_shape_and_a_batch_is_of_one(tmp_path):
    sizes = bucket_sizes(64, 16)
    assert (64, 64) in sizes and all(H % 16 == W % 16 == 0 and max(H, W) <= 2 * min(H, W) and abs(H * W - 64 * 64) <= 0.25 * 64 * 64 for H, W in sizes)
    wide, tall = np.zeros((40, 80, 3), np.uint8), np.zeros((90, 50, 3), np.uint8)
    wide[:, :20], tall[-30:] = 255, 255                              # its left quarter and its lowest third are white
    for i in range(14):
        save(wide if i % 7 < 4 else tall, tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text(f"{'wide' if i % 7 < 4 else 'tall'} {i}")
    parts = ImageFolder(tmp_path, 64).by_shape(sizes)
    assert [len(p) for p in parts] == [6, 8] and image_size(parts[0].files[0]) == (90, 50)
    (H, W), (h, w) = parts[1].size, parts[0].size
    assert W > 1.5 * H and h > 1.5 * w and parts[0].identity != parts[1].identity
    x, _ = parts[1].batch(torch.tensor([0]))
    assert x.shape == (1, 3, H, W) and x[0, :, :, 2].min() > 0.9 and x[0, :, :, W // 2].max() < -0.9       # nothing is cut off at the sides ...
    square = ImageFolder(tmp_path, 64).batch(torch.tensor([0]))[0]
    assert square[0, :, :, 2].max() < -0.9                           # ... where the square has lost its left quarter
    cache = Buckets([LatentCache(tmp_path / "cache", part, [averages(4, 1)], flip=True) for part in parts])
    text = cache.captions()
    assert len(cache) == len(text) == 28 and len(cache.pieces(5)) == 3 + 4
    times = torch.zeros(28, dtype=torch.long)
    for step in range(28):                                           # of 4 rows each: as often as each other, 4 times
        rows = order(step, 4, cache.buckets, seed=0)
        z, labels = cache.batch(rows)
        times += rows.bincount(minlength=28)
        shape = "tall" if z["averages-f4"].shape[-1] == w // 4 else "wide"
        assert all(text[r].startswith(shape) for r in rows)
    assert times.tolist() == [4] * 28
    assert torch.equal(cache.labels[rows], labels)


def test_encoded_prompts_that_were_killed_go_on_and_equal_ones_are_read_once(tmp_path):
    prompts = [f"prompt {i % 600}" for i in range(700)]
    make = lambda root, encoder, prompts=prompts, what="it": TextCache(tmp_path / root, prompts, what, encoder)
    straight = make("a", Encoder())
    with pytest.raises(KeyboardInterrupt):
        make("b", Encoder(400))
    rest = Encoder()
    resumed = make("b", rest)
    assert rest.start - rest.left == 601 - 256 and len(resumed) == 700
    for file in straight.dir.glob("*.npy"):
        assert file.read_bytes() == (resumed.dir / file.name).read_bytes()
    rows = torch.tensor([3, 603, 5])
    text = make("b", Encoder(0))[rows]                               # whole: nothing is read
    assert text.tokens.dtype == torch.bfloat16 and torch.equal(text.tokens[0], text.tokens[1]) and not torch.equal(text.tokens[0], text.tokens[2])
    assert torch.equal(text.tokens[2:], Encoder()()("prompt 5", False)["tokens"]) and torch.equal(resumed.null.tokens, Encoder()()("", True)["tokens"])
    assert text.mask.dtype == torch.bool and text.mask.all() and text.pooled is None and resumed.null.mask is None and len(resumed.null) == 1
    for other in (make("b", Encoder(), prompts[:-101]), make("b", Encoder(), what="another encoder")):
        assert other.dir != resumed.dir


def test_stale_or_partial_encoded_prompts_are_refused_with_the_reason(tmp_path):
    make = lambda: TextCache(tmp_path, ["a", "b"], "it", Encoder())
    folder = make().dir
    whole = (folder / "tokens.npy").read_bytes()
    (folder / "tokens.npy").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="tokens.npy is missing or not whole.*delete the folder and run again"):
        make()
    (folder / "tokens.npy").write_bytes(whole)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | dict(what=meta["what"] | dict(what="another"))))
    with pytest.raises(ValueError, match="tells of another making than its folder's name"):
        make()
    (folder / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="meta.json is damaged"):
        make()


def test_words_are_encoded_at_once_behind_the_same_interface(tmp_path):
    texts = cache_prompts("words", None, ["a red ring", "a blue cross"], 8, cache=tmp_path)
    assert len(texts) == 2 and torch.equal(texts[torch.tensor([1])].tokens, encode_words(["a blue cross"], 8).tokens)
    assert texts.null.mask is None and len(texts.null) == 1 and not any(tmp_path.iterdir())
