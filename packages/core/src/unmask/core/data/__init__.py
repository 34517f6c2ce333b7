"""What the data of every domain share: folders, shards, splits, damaged samples, and the sets that come by name.

A domain's `unmask.core.domain.Data` module is its settings, its suffixes and decoding, its sample, batch and collate;
the rest is here. In full, for poems in text files or tar shards::

    def examine(file: BinaryIO, name: str) -> dict[str, Any]:  # headers: called once for each file, ever
        if not file.read(1):
            raise CorruptSampleError("empty file")
        return {}


    POEMS = Kind("poem", (".txt",), examine, expected="Give a folder of poems")


    def decode(file: Path | Window, name: str) -> str:
        return file.read_bytes().decode()


    def open_place(place: Place) -> Source:  # splits, classes and unreadable files are found
        pack, names = place.pick(POEMS)
        return open_shards(place, names, POEMS, decode) if pack else open_files(place, names, POEMS, decode)


    class Poems(SplitDataset[Sample]):
        kind = POEMS

        def __getitem__(self, item: tuple[int, int]) -> Sample:
            return self.first_good(item[0], lambda at: Sample(self.read_plain(at), int(self.ids[at])))


    def open_split(settings: Settings, split: Split, *, seed: int = 0, augment: bool = False) -> Poems:
        source = open_source(settings.source, POEMS, open_place, corrupt=settings.corrupt)
        members = members_of(source, split, settings.val_share, settings.source, POEMS)
        return Poems(source, members, settings, seed=seed, augment=augment)


    def resolve(settings: Settings) -> Settings:
        open_split(settings, "train")[0, 0]
        return absolute(settings)

`kinds` has `Kind` and the errors, `folders` what a folder holds, `headers` and `shards` the indexes in the cache,
`sources` the `Source` and how it is opened once, `dataset` the base of data sets, `splits` who is in which split,
`carriers` sets that come by name and `stored` their decoded arrays.
"""
