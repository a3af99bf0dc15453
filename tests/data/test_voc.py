from __future__ import annotations

import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest

from cnnrnn.data import DataError, Dataset, Problems, load_dataset
from cnnrnn.data.sources.voc import MAX_XML_BYTES, VOC_LABELS, load_voc
from tests.data import sources

pytest.importorskip("defusedxml")

CAT, DOG, PERSON = (VOC_LABELS.index(name) for name in ("cat", "dog", "person"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return sources.write_voc(tmp_path / "VOCdevkit" / "VOC2007")


def test_everything_is_read(root: Path) -> None:
    dataset = load_dataset(f"voc:{root}")
    assert dataset.source == f"voc:{root}" and len(dataset.label_names) == 20
    ids = ("000001", "2008_000003", "000002", "000004")
    assert dataset.image_paths == tuple(root / "JPEGImages" / f"{i}.jpg" for i in ids)
    assert [dataset.labels(i).tolist() for i in range(4)] == [[DOG, PERSON], [DOG], [CAT], []]
    assert {name: records.tolist() for name, records in dataset.splits.items()} == {
        "train": [0, 1], "val": [2], "trainval": [0, 2, 1], "test": [3],
    }  # fmt: skip


def test_difficult_objects_are_neither_present_nor_absent(root: Path) -> None:
    dataset = load_voc(root)
    assert dataset.unknown_matrix().nonzero().tolist() == [[2, DOG]]
    part = dataset.split("trainval")
    assert part.unknown_matrix().nonzero().tolist() == [[1, DOG]]
    assert part.label_matrix()[1].nonzero().flatten().tolist() == [CAT]


def test_boxes_cover_pixels_from_0(root: Path) -> None:
    boxes = load_voc(root).boxes
    assert boxes is not None and boxes.indptr.tolist() == [0, 2, 3, 4, 4]
    assert boxes.label_indices.tolist() == [DOG, PERSON, DOG, CAT]
    assert boxes.xywh.tolist() == [[1, 0, 3, 6], [0, 0, 8, 6], [0.5, 1, 2.75, 3], [2, 2, 1, 1]]


@pytest.mark.parametrize("up", [1, 2])
def test_a_folder_with_one_year(root: Path, up: int) -> None:
    assert load_voc(root.parents[up - 1]).source == f"voc:{root}"


def test_a_folder_with_two_years(root: Path) -> None:
    shutil.copytree(root, root.with_name("VOC2012"))
    with pytest.raises(DataError, match="VOC2007, VOC2012: name one, such as voc:.*VOC2007"):
        load_voc(root.parent)


def test_label_files_are_not_needed(root: Path) -> None:
    for file in root.glob("ImageSets/Main/*_*.txt"):
        file.unlink()
    assert load_voc(root).label_counts()[DOG] == 2


def test_a_split_named_like_a_label(root: Path) -> None:
    """`train` is a label as well: train_train.txt is its file for the split."""
    main = root / "ImageSets" / "Main"
    (main / "train_train.txt").write_text("000001 -1\n2008_000003 -1\n")
    assert set(load_voc(root).splits) == {"train", "val", "trainval", "test"}
    (main / "train_train.txt").write_text("000001 -1\n2008_000003  1\n")
    with pytest.raises(DataError, match="train_train.txt, line 2: image 2008_000003 must be -1"):
        load_voc(root)


def test_a_split_of_ones_own(root: Path) -> None:
    """train_small.txt is no file of the label train where there is no split small."""
    main = root / "ImageSets" / "Main"
    (main / "train_small.txt").write_text("2008_000003\n")
    (main / "dog_tiny.txt").write_text("000001 -1\n")
    dataset = load_voc(root)
    assert set(dataset.splits) == {"train", "val", "trainval", "test", "train_small"}
    assert dataset.splits["train_small"].tolist() == [1]


def test_a_test_split_may_lack_annotations(root: Path) -> None:
    (root / "ImageSets" / "Main" / "test.txt").write_text("000004\n000005\n")
    for file in root.glob("ImageSets/Main/*_test.txt"):
        file.write_text("000004 -1\n000005 -1\n")
    with pytest.warns(UserWarning, match=r"test.txt: 1 of its 2 images have no annotation, the "
                                         r"first is line 2 \(image 000005\)"):  # fmt: skip
        dataset = load_voc(root)
    assert dataset.splits["test"].tolist() == [3]


def test_a_missing_difficult_means_0(root: Path) -> None:
    file = root / "Annotations" / "000002.xml"
    file.write_text(file.read_text().replace("<difficult>0</difficult>", ""))
    assert load_voc(root).labels(2).tolist() == [CAT]


def test_a_split_without_any_annotation_is_left_out(root: Path) -> None:
    (root / "Annotations" / "000004.xml").unlink()
    with pytest.warns(UserWarning, match="test.txt: none of its 1 images has an annotation"):
        dataset = load_voc(root)
    assert len(dataset) == 3 and "test" not in dataset.splits
    for file in root.glob("Annotations/*.xml"):
        file.unlink()
    with (
        pytest.warns(UserWarning, match="none of its"),
        pytest.raises(DataError, match="must hold at least one image, got none in any split"),
    ):
        load_voc(root)


def test_missing_images(root: Path) -> None:
    (root / "JPEGImages" / "2008_000003.jpg").unlink()
    message = r"image 2008_000003 must exist as .*2008_000003.jpg, found no such file \(1 of 4"
    with pytest.raises(DataError, match=message):
        load_voc(root)
    with pytest.warns(UserWarning, match=message):
        dataset = load_voc(root, on_bad_image="skip")
    assert dataset.splits["train"].tolist() == [0] and dataset.splits["val"].tolist() == [1]
    assert dataset.unknown_matrix().nonzero().tolist() == [[1, DOG]]


BOMB = '<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'
XML = sources.voc_xml("000001", sources.VOC_OBJECTS["000001"])
NAME, BOX = "<name>dog</name>", "<xmin>2</xmin>"

BAD_XML = {
    "malformed": (XML.replace("</size>", ""), "must be valid XML, got mismatched tag: line 4"),
    "truncated": (XML[:-20], "must be valid XML, got"),
    "empty": ("", "must be valid XML, got no element found"),
    "encoding": ('<?xml version="1.0" encoding="x-none"?><annotation/>', "must be valid XML, got"),
    "entities": (BOMB + XML, "must be plain XML, got a forbidden DTD"),
    "external": ('<!DOCTYPE a SYSTEM "file:///etc/passwd">' + XML, "plain XML, got a forbidden"),
    "huge": ("<annotation>" + " " * MAX_XML_BYTES + "</annotation>", "annotation of at most 10485"),
    "deep": ("<annotation>" + "<a>" * 100_000, "must be valid XML, got"),
    "root": ("<html></html>", "must hold an <annotation>, got 'html'"),
    "no name": (XML.replace(NAME, ""), "object 1 must have a non-empty string as name, got n"),
    "two names": (XML.replace(NAME, NAME * 2), "object 1 must have one name, got '2 of them'"),
    "difficult": (XML.replace("<difficult>0", "<difficult>2"), "object 1: difficult .*got '2'"),
}  # fmt: skip


BAD_BOXES = {
    "no xmin": (XML.replace(BOX, ""), "object 1: xmin must be a number below 1e9, got none"),
    "xmin nan": (XML.replace(BOX, "<xmin>nan</xmin>"), "object 1: xmin must .*got 'nan'"),
    "xmin inf": (XML.replace(BOX, "<xmin>-inf</xmin>"), "object 1: xmin must .*got '-inf'"),
    "xmin 1e400": (XML.replace(BOX, "<xmin>1e400</xmin>"), "object 1: xmin must .*got '1e400'"),
    "xmin long": (XML.replace(BOX, f"<xmin>{'9' * 5000}</xmin>"), "object 1: xmin must .*got '999"),
    "xmin words": (XML.replace(BOX, "<xmin>two</xmin>"), "object 1: xmin must .*got 'two'"),
    "xmin other digits": (XML.replace(BOX, "<xmin>٢</xmin>"), "object 1: xmin must .*got '٢'"),
    "box turned": (XML.replace(BOX, "<xmin>5</xmin>"), "xmin <= xmax.* got 5, 1, 4, 6"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_BOXES)
def test_a_broken_box_is_no_box(root: Path, case: str) -> None:
    text, message = BAD_BOXES[case]
    (root / "Annotations" / "000001.xml").write_text(text, encoding="utf-8")
    with pytest.warns(UserWarning, match=f"the bndbox of . objects is not right, .*{message}"):
        dataset = load_voc(root)
    assert dataset.labels(0).tolist() == [DOG, PERSON]
    boxes = dataset.boxes
    assert boxes is not None and DOG not in boxes.label_indices[: boxes.indptr[1]].tolist()


def test_a_missing_box_is_no_box(root: Path) -> None:
    (root / "Annotations" / "000001.xml").write_text(XML.replace("bndbox>", "b>"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = load_voc(root)
    assert dataset.labels(0).tolist() == [DOG, PERSON]
    assert dataset.boxes is not None and dataset.boxes.indptr.tolist() == [0, 0, 1, 2, 2]


# Own data sets in VOC's format.

OWN = {"b1": ["lorry", "crane"], "b2": ["crane"], "b3": []}


def own_xml(names: list[str], file_name: str = "camera.jpg", difficult: int = 0) -> str:
    objects = [(name, difficult, (1, 1, 2, 2)) for name in names]
    return sources.voc_xml("x", objects).replace("x.jpg", file_name)


def write_own(annotations: Path, pictures: Path, suffix: str = ".jpg") -> None:
    annotations.mkdir(parents=True, exist_ok=True)
    for image_id, names in OWN.items():
        (annotations / f"{image_id}.xml").write_text(own_xml(names))
        sources.write_picture(pictures / f"{image_id}{suffix}")


def read_labels(dataset: Dataset) -> dict[str, list[str]]:
    return {
        path.stem: [dataset.label_names[label] for label in dataset.labels(i)]
        for i, path in enumerate(dataset.image_paths or ())
    }


EXPECTED = {image_id: sorted(names) for image_id, names in OWN.items()}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".JPEG", ".webp"])
@pytest.mark.parametrize(
    ("annotations", "pictures"),
    [("", ""), ("xml", "xml"), ("Annotations", "JPEGImages"), ("annotations", "images"),
     ("xml", "pictures"), ("Annotations", ""), ("", "images")],
)  # fmt: skip
def test_own_names_without_lists(
    tmp_path: Path, annotations: str, pictures: str, suffix: str
) -> None:
    write_own(tmp_path / annotations, tmp_path / pictures, suffix)
    problems = Problems()
    dataset = load_voc(tmp_path, problems=problems)
    assert dataset.label_names == ("crane", "lorry") and read_labels(dataset) == EXPECTED
    assert {name: len(rows) for name, rows in dataset.splits.items()} == {"all": 3}
    assert [n for n in problems.notes if "the labels are the names that occur, 2, as" in n]


def test_folders_that_are_named_like_splits(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_own(tmp_path / split, tmp_path / split)
    dataset = load_dataset(f"voc:{tmp_path}")
    paths = dataset.image_paths
    assert paths is not None and len(paths) == 6
    assert [paths[i].parent.name for i in dataset.splits["train"]] == ["train"] * 3
    assert [paths[i].parent.name for i in dataset.splits["val"]] == ["valid"] * 3


def test_pictures_without_annotations_are_counted(tmp_path: Path) -> None:
    """As in the Oxford pets, whose XML files lie below `annotations` with droppings among them."""
    write_own(tmp_path / "annotations" / "xmls", tmp_path / "images")
    (tmp_path / "annotations" / "xmls" / "._b1.xml").write_bytes(b"\0\5")
    sources.write_picture(tmp_path / "images" / "other.jpg")
    message = "1 images have no annotation, the first: 'images/other.jpg'; they are left out"
    with pytest.warns(UserWarning, match=message):
        assert read_labels(load_voc(tmp_path)) == EXPECTED


def test_pictures_apart_from_the_folder(tmp_path: Path) -> None:
    write_own(tmp_path / "xml", tmp_path / "elsewhere")
    dataset = load_dataset(f"voc:{tmp_path / 'xml'}", images=tmp_path / "elsewhere")
    assert read_labels(dataset) == EXPECTED


def test_names_of_voc_alone_keep_its_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(own_xml(["dog"]))
    sources.write_picture(tmp_path / "a.jpg")
    assert load_voc(tmp_path).label_names == VOC_LABELS
    (tmp_path / "a.xml").write_text(own_xml(["Dog", "cat"]))
    assert load_voc(tmp_path).label_names == ("Dog", "cat")


def test_a_difficult_object_of_an_own_name(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(own_xml(["lorry"], difficult=1))
    sources.write_picture(tmp_path / "a.jpg")
    dataset = load_voc(tmp_path)
    assert dataset.label_names == ("lorry",) and dataset.unknown_matrix().tolist() == [[True]]


def test_labels_of_a_file(tmp_path: Path) -> None:
    write_own(tmp_path / "set", tmp_path / "set")
    words = tmp_path / "words.txt"
    words.write_text("lorry\nferry\ncrane\n")
    dataset = load_dataset(f"voc:{tmp_path / 'set'},labels={words}")
    assert dataset.label_names == ("lorry", "ferry", "crane")
    words.write_text("lorry\n")
    with pytest.raises(
        DataError, match="b1.xml, object 2 must have one of the 1 names of labels=F"
    ):
        load_dataset(f"voc:{tmp_path / 'set'},labels={words}")


IDS = ["shot 7 (2)", "a.b.c", "x+y,z", "Grün", "-1", "sub/deep"]


@pytest.mark.parametrize("written", ["{}", "{}.jpg", " {} ", "{}.xml"])
def test_ids_are_any_file_names(tmp_path: Path, written: str) -> None:
    main = tmp_path / "ImageSets" / "Main"
    main.mkdir(parents=True)
    for image_id in IDS:
        file = tmp_path / "Annotations" / f"{image_id}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(own_xml(["crane"]))
        sources.write_picture(tmp_path / "JPEGImages" / f"{image_id}.jpg")
    lines = [written.format(image_id) for image_id in IDS]
    (main / "train.txt").write_text("\n".join(lines[:4]) + "\n")
    (main / "dev.txt").write_text("\n".join(lines[4:]) + "\n")
    dataset = load_voc(tmp_path)
    assert dataset.image_paths == tuple(tmp_path / "JPEGImages" / f"{i}.jpg" for i in IDS)
    assert {name: len(rows) for name, rows in dataset.splits.items()} == {"train": 4, "val": 2}


def test_label_files_of_own_names(tmp_path: Path) -> None:
    main = tmp_path / "ImageSets" / "Main"
    main.mkdir(parents=True)
    write_own(tmp_path / "Annotations", tmp_path / "JPEGImages")
    (main / "train.txt").write_text("b1\nb2\nb3\n")
    (main / "tower_crane_train.txt").write_text("b1 -1\nb2 -1\nb3 -1\n")  # of no object
    (main / "crane_train.txt").write_text("b1  1\nb2  1\nb3 -1\n")
    assert set(load_voc(tmp_path).splits) == {"train"}
    (main / "crane_train.txt").write_text("b1  1\nb2 -1\nb3 -1\n")
    with pytest.raises(DataError, match="crane_train.txt, line 2: image b2 must be 1 as its annot"):
        load_voc(tmp_path)


def test_the_picture_of_an_annotation(root: Path) -> None:
    """Its own name with any suffix, and else what it has as filename."""
    pictures = root / "JPEGImages"
    file = root / "Annotations" / "000001.xml"
    file.write_text(XML.replace("000001.jpg", "..\\..\\Other View.PNG"))
    assert load_voc(root).image_paths[0] == pictures / "000001.jpg"  # type: ignore[index]
    (pictures / "000001.jpg").rename(pictures / "Other View.PNG")
    with pytest.raises(DataError, match="image 000001 must exist as .*000001.jpg, found no such"):
        load_voc(root)
    file.write_text(XML.replace("000001.jpg", "C\\day\\Other View.PNG"))
    assert load_voc(root).image_paths[0] == pictures / "Other View.PNG"  # type: ignore[index]
    (pictures / "Other View.PNG").rename(pictures / "000001.Tiff")
    assert load_voc(root).image_paths[0] == pictures / "000001.Tiff"  # type: ignore[index]


def test_names_that_differ_in_case(root: Path) -> None:
    (root / "Annotations" / "2008_000003.xml").rename(root / "Annotations" / "2008_000003.XML")
    file = root / "ImageSets" / "Main" / "train.txt"
    (root / "JPEGImages" / "000002.jpg").rename(root / "JPEGImages" / "000002.JPG")
    problems = Problems()
    dataset = load_voc(root, problems=problems)
    assert dataset.image_paths[2] == root / "JPEGImages" / "000002.JPG"  # type: ignore[index]
    assert [n for n in problems.notes if f"{file}: 1 names differ from their files" in n]


def test_two_annotations_of_one_picture(root: Path) -> None:
    (root / "JPEGImages" / "000001.jpg").unlink()
    file = root / "Annotations" / "000001.xml"
    file.write_text(XML.replace("000001.jpg", "000002.jpg"))
    with pytest.raises(DataError, match="must have an image of its own, got '000002.jpg' as 00000"):
        load_voc(root)


def test_names_of_splits(root: Path) -> None:
    main = root / "ImageSets" / "Main"
    for file in main.glob("*_*.txt"):
        file.unlink()
    (main / "train.txt").rename(main / "Training.txt")
    (main / "val.txt").rename(main / "valid.txt")
    (main / "test.txt").rename(main / "TESTING.txt")
    dataset = load_voc(root)
    assert list(dataset.splits) == ["train", "val", "trainval", "test"]
    (main / "dev.txt").write_text("000004\n")
    with pytest.raises(DataError, match="one name for a split, got 'dev' and 'valid', which both"):
        load_voc(root)


def test_droppings_are_no_lists_and_no_ids(root: Path) -> None:
    main = root / "ImageSets" / "Main"
    for folder in (main, root / "Annotations"):
        (folder / "._train.txt").write_bytes(b"\0\5\xff")
    (main / "train.txt").write_text("000001\n._000001\n2008_000003\n")
    with pytest.warns(UserWarning, match="train.txt: 1 ids are hidden files"):
        assert load_voc(root).splits["train"].tolist() == [0, 1]


def test_links_are_followed_where_asked(root: Path, tmp_path: Path) -> None:
    (root / "JPEGImages").rename(tmp_path / "pictures")
    (root / "JPEGImages").mkdir()
    for file in (tmp_path / "pictures").iterdir():
        (root / "JPEGImages" / file.name).symlink_to(file)
    with pytest.raises(DataError, match="follow_links allows it"):
        load_voc(root)
    assert len(load_dataset(f"voc:{root}", follow_links=True)) == 4


@pytest.mark.parametrize("case", BAD_XML)
def test_errors_name_file_and_object(root: Path, case: str) -> None:
    text, message = BAD_XML[case]
    file = root / "Annotations" / "000001.xml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load_voc(root)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_an_entity_is_never_expanded(root: Path) -> None:
    """Without the rule against DTDs this would read as a name of VOC's."""
    file = root / "Annotations" / "000001.xml"
    file.write_text('<!DOCTYPE a [<!ENTITY dog "dog">]>' + XML.replace(NAME, "<name>&dog;</name>"))
    with pytest.raises(DataError, match="got a forbidden DTD"):
        load_voc(root)


BAD_MAIN: dict[str, tuple[str, str | bytes, str]] = {
    "id up": ("train", "../000001\n", r"line 1: an image id must be a file name .* got '\.\./0000"),
    "id absolute": ("train", "000001\n/etc/passwd\n", "line 2: an image id must .*'/etc/passwd'"),
    "id URL": ("val", "http://h/a\n", "line 1: an image id must .*'http://h/a'"),
    "id NUL": ("val", "0000\x0002\n", "line 1: an image id must"),
    "id blank": ("train", "000001\n\n2008_000003\n", "line 2: an image id must .*got ''"),
    "two columns": ("trainval", "000001\n2008_000003 1\n",
                    r"line 2 \(image 2008_000003 1\) must have an annotation in .*3 1.xml"),
    "id twice": ("train", "000001\n2008_000003\n000001\n", "line 3: .*got 000001 as in line 1"),
    "no annotation": ("trainval", "000001\n000009\n",
                      r"line 2 \(image 000009\) must have an annotation in .*000009.xml"),
    "not UTF-8": ("train", b"000001\n\xff\n", "line 2: text must be UTF-8, got byte 0xff"),
    "label value": ("dog_train", "000001 2\n2008_000003 1\n", "line 1: .* 1, -1 or 0, got '0000"),
    "label columns": ("dog_train", "000001\n", "line 1: a line must be an image id and 1, -1 or 0"),
    "label differs": ("dog_val", "000002 -1\n", "line 1: image 000002 must be 0 as its annotation"),
    "label not difficult": ("dog_train", "000001 1\n2008_000003 0\n", "2008_000003 must be 1"),
    "label twice": ("dog_val", "000002 0\n000002 0\n", "line 2: image ids must be unique, got"),
    "label stranger": ("dog_val", "000002 0\n000001 1\n", "line 2: image ids must be .*val.txt"),
    "label missing": ("dog_train", "000001 1\n", r"every image of train.txt.*2008_000003 \(1 miss"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MAIN)
def test_errors_name_list_and_line(root: Path, case: str) -> None:
    name, content, message = BAD_MAIN[case]
    file = root / "ImageSets" / "Main" / f"{name}.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        load_voc(root)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_links_may_not_leave_the_folder(root: Path, tmp_path: Path) -> None:
    for folder, name in (("Annotations", "000001.xml"), ("JPEGImages", "000001.jpg")):
        file = root / folder / name
        file.rename(tmp_path / name)
        file.symlink_to(tmp_path / name)
        with pytest.raises(DataError, match=f"must be a file inside .*{folder}, got {name} which"):
            load_voc(root)
        file.unlink()
        (tmp_path / name).rename(file)


def test_pipes_are_not_read(root: Path) -> None:
    (root / "ImageSets" / "Main" / "val.txt").unlink()
    os.mkfifo(root / "ImageSets" / "Main" / "val.txt")
    with pytest.raises(DataError, match="val.txt must be a file, found something that is not a"):
        load_voc(root)


def test_layout_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere must be a VOC folder, found no such folder"):
        load_voc(tmp_path / "nowhere")
    with pytest.raises(DataError, match="must hold ImageSets/Main, or a VOC<year> folder"):
        load_voc(tmp_path)
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    with pytest.raises(DataError, match="Main must hold a file of image ids per split"):
        load_voc(tmp_path)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("000001\n")
    with pytest.raises(DataError, match="Annotations must hold the annotations of .*train.txt"):
        load_voc(tmp_path)


def test_deep_nesting(root: Path) -> None:
    file = root / "Annotations" / "000004.xml"
    file.write_text("<annotation>" + "<a>" * 100_000 + "</a>" * 100_000 + "</annotation>")
    assert load_voc(root).labels(3).tolist() == []


def test_every_problem_is_kept(root: Path) -> None:
    main = root / "ImageSets" / "Main"
    (root / "Annotations" / "000001.xml").write_text("<annotation>")
    (root / "Annotations" / "000002.xml").write_text(
        sources.voc_xml("000002", [("cat", 0, (3, 3, 3, 3)), ("horse", 3, (1, 1, 1, 1))])
    )
    (main / "val.txt").write_text("000002\n..\n000002\n")
    (main / "person_test.txt").write_text("000004 1\n")
    (root / "JPEGImages" / "000004.jpg").unlink()
    problems = Problems(keep=True)
    dataset = load_voc(root, problems=problems)
    expected = ("val.txt, line 2", "val.txt, line 3", "000001.xml must be valid XML",
                "000002.xml, object 2: difficult", "person_test.txt, line 1",
                "image 000004 must exist")  # fmt: skip
    assert len(problems.messages) == len(expected)
    for part in expected:
        assert sum(part in message for message in problems.messages) == 1, part
    assert [path.stem for path in dataset.image_paths or ()] == ["2008_000003"]


def test_missing_extra(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "defusedxml", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "cnnrnn\[vision\]"'):
        load_voc(root)
