"""Kinds of data sets. None of them knows of training.

A kind is a class with random access by index:

    len(dataset)          how many images there are
    dataset[i]            a `Sample`; raises UnreadableError, an InputError, if that image is damaged
    dataset.label(i)      its class, without reading the image
    num_classes           0 to num_classes - 1
    check()               raises InputError if this machine, which got the object by pickle from the process that made
                          it, has not the same files; may be left out

Its arguments are those of `path`, `count`, `size` and `seed` that it has, from the section data of a configuration:
`data.path`, `data.size`, the side of the images in pixels, and `train.seed`. One of your own, named as
`data.kind: mypackage.data:MyImages`, gets those of `data.options` as well.
"""

TABLE = {
    "shapes": "asymflow.data.shapes:Shapes",
    "image_folder": "asymflow.data.folder:ImageFolder",
    "webdataset": "asymflow.data.shards:TarShards",
    "encoded": "asymflow.data.encoded:EncodedShards",
}
