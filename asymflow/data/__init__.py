"""Kinds of data sets. None of them knows of training.

A kind is a class with random access by index:

    len(dataset)          how many images there are
    dataset[i]            an `asymflow.data.sample.Sample`, with a uint8 image (3, H, W); raises UnreadableError, an
                          InputError, if that image is damaged
    dataset.label(i)      its class, without reading the image
    num_classes           0 to num_classes - 1
    classes               optional: their names, a list
    digest                optional: a text that another data set of the same size has not. A training goes on only with
                          the data that it was begun with
    remarks               optional: what a user should know of it at the start of a training, a list of texts
    check()               optional. Another process, perhaps on another machine, made the object and sent it by pickle;
                          raises InputError if this machine does not have the same files

If its class has arguments called `path`, `count`, `size` or `seed`, they get `data.path`, `data.size`, the side of the
images in pixels, and `train.seed` from the configuration. One of your own, named as
`data.kind: mypackage.data:MyImages`, also gets `data.options`.
"""

TABLE = {
    "shapes": "asymflow.data.shapes:Shapes",
    "image_folder": "asymflow.data.folder:ImageFolder",
    "webdataset": "asymflow.data.shards:TarShards",
    "encoded": "asymflow.data.encoded:EncodedShards",
}
