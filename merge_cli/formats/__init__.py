"""Storage formats, one file each: how quantised weights are recognised, read and written.

To add a format:

1. Write `formats/NAME.py` with a class like `mxfp4.Mxfp4` (the protocol is `StorageFormat`):

       detect     does this model use the format? From headers and config.json alone.
       decode     name -> tensor, each a `checkpoint.tensors.Tensor` that computes float32 from the
                  stored codes while it is read (as `mxfp4.TransposedMxfp4` does)

   A format that is written, too, is a `WritableFormat`, as `fp8.Fp8` is:

       encode     float32 rows -> codes and scales
       settings   what config.json says of an output in this format

2. Add it to `FORMATS` in formats/detect.py.
3. Test it against the numbers of whoever made the format (`tests/support/quantised.py`), and add a
   row to docs/precision.md.

Sources are then read as numbers wherever they are opened: methods, engine and plans see float32.
Formats that cannot be read are refused by name, with what to do instead (`ADVICE`).
"""
