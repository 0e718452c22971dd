"""Which files a run reads, and where their output goes."""

import os
from pathlib import PurePosixPath

import pytest
from nemotron_vl.reading.inputs import Source, choose_output, find_documents, find_duplicates, place_key


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode("utf-8", "surrogateescape"))


def names_of(*inputs) -> list[str]:
    return [str(source.name) for source in find_documents(inputs).sources]


def test_a_folder_gives_its_documents_sorted_and_counts_what_is_none(tmp_path):
    make(
        tmp_path,
        "b.PDF",
        "a.png",
        "sub/c d.tif",
        "sub/ünï.jpg",
        "notes.txt",
        "sub/data.csv",
        ".hidden.png",
        ".git/x.png",
    )
    found = find_documents([tmp_path])
    assert [str(source.name) for source in found.sources] == ["a.png", "b.PDF", "sub/c d.tif", "sub/ünï.jpg"]
    assert found.num_others == 2


def test_a_file_that_is_named_is_read_whatever_it_is_called(tmp_path):
    make(tmp_path, "scan.0001", "letter")
    assert names_of(tmp_path / "scan.0001", tmp_path / "letter") == ["scan.0001", "letter"]


def test_a_pattern_that_the_shell_has_left_is_matched(tmp_path):
    make(tmp_path, "a.png", "b.png", "x/y/c.png", "notes.txt", "[1].png")
    assert names_of(str(tmp_path / "?.png")) == ["a.png", "b.png"]
    assert names_of(str(tmp_path / "**" / "c.png")) == ["c.png"]
    assert names_of(str(tmp_path / "*")) == ["[1].png", "a.png", "b.png", "y/c.png"]
    assert names_of(str(tmp_path / "[1].png")) == ["[1].png"]  # a file with signs of a pattern in its name


def test_a_file_that_several_inputs_give_is_read_once(tmp_path):
    make(tmp_path, "a.png", "b.png")
    assert names_of(tmp_path / "b.png", tmp_path, str(tmp_path / "*.png"), f"{tmp_path}/./a.png") == ["b.png", "a.png"]


def test_a_loop_of_links_ends_and_a_linked_folder_is_entered_once(tmp_path):
    make(tmp_path, "in/a.png", "other/b.png")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    assert sorted(names_of(tmp_path / "in")) == ["a.png", "linked/b.png"]


def test_a_link_to_a_document_is_a_document_and_a_dangling_one_a_failed_document(tmp_path):
    make(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "gone.png")
    assert names_of(tmp_path) == ["a.png", "b.png", "c.png"]
    with pytest.raises(ValueError, match=r"c\.png is a link that leads nowhere"):
        find_documents([tmp_path / "c.png"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_a_document_with_an_error(tmp_path):
    make(tmp_path, "a.png", "closed/b.png")
    (tmp_path / "closed").chmod(0)
    try:
        sources = find_documents([tmp_path]).sources
    finally:
        (tmp_path / "closed").chmod(0o755)
    assert [source.error is None for source in sources] == [True, False]


def test_inputs_that_cannot_be_meant_are_named(tmp_path):
    make(tmp_path, "notes.txt")
    os.mkfifo(tmp_path / "pipe.png")
    for given, says in {
        "absent.pdf": "absent.pdf does not exist",
        "*.pdf": r"Nothing matches .*\*\.pdf",
        "": "holds no document. A folder gives files of .avif, .bmp",
        "pipe.png": "neither a file nor a folder",
    }.items():
        with pytest.raises(ValueError, match=says):
            find_documents([tmp_path / given if given else tmp_path])


# --- where the output goes ---


def choose_all(*sources: Source) -> list[str]:
    taken: set[str] = set()
    places = []
    for source in sources:
        places.append(choose_output(source, lambda place: place_key(place) in taken))
        taken.add(place_key(places[-1]))
    return places


def test_outputs_mirror_the_tree_and_keep_the_ending_of_the_document(tmp_path):
    make(tmp_path, "a.pdf", "a.png", "sub/a.pdf")
    assert choose_all(*find_documents([tmp_path]).sources) == ["a.pdf", "a.png", "sub/a.pdf"]


def test_documents_of_one_name_get_the_folders_above_them(tmp_path):
    make(tmp_path, "2024/may/a.pdf", "2025/may/a.pdf", "2025/june/a.pdf")
    inputs = [tmp_path / "2024/may/a.pdf", tmp_path / "2025/may/a.pdf", tmp_path / "2025/june"]
    assert choose_all(*find_documents(inputs).sources) == ["a.pdf", "may/a.pdf", "june/a.pdf"]


def test_names_that_a_file_system_may_take_for_one_are_kept_apart():
    assert choose_all(*(Source(f"/in/{name}", PurePosixPath(name)) for name in ("A.pdf", "a.pdf", "é.pdf", "é.pdf"))) == [
        "A.pdf", "in/a.pdf", "é.pdf", "in/é.pdf",
    ]  # fmt: skip


def test_a_number_is_put_behind_where_folders_do_not_suffice():
    source = Source("/a.pdf", PurePosixPath("a.pdf"))
    assert choose_all(source, source, source) == ["a.pdf", "a.pdf-2", "a.pdf-3"]


def test_a_name_too_long_for_a_file_system_is_shortened_and_stays_its_own():
    long, other = (Source(f"/in/{'ü' * 120}{end}.pdf", PurePosixPath(f"{'ü' * 120}{end}.pdf")) for end in "ab")
    places = choose_all(long, other)
    assert len(set(places)) == 2 and all(len(os.fsencode(place)) <= 200 for place in places)


def test_equal_contents_are_found_among_files_of_equal_size(tmp_path):
    for name, content in {"a": b"1", "b": b"2", "c": b"1", "d": b"11", "e": b"1"}.items():
        (tmp_path / name).write_bytes(content)
    files = [str(tmp_path / name) for name in "abcde"]
    assert find_duplicates([*files, str(tmp_path / "gone")]) == {files[0]: [files[2], files[4]]}
