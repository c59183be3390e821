"""Storage formats, one file each: how quantised weights are recognised, read and written.

To add a format:

1. Write `formats/NAME.py` with a class like `mxfp4.Mxfp4` (the protocol is `StorageFormat`):

       detect     does this model use the format? From headers and config.json alone.
       decode     name -> tensor, each a `checkpoint.tensors.Tensor` that computes float32 from the
                  stored codes while it is read (as `mxfp4.TransposedMxfp4` does)

   Tensors of a format that is written, too, have an `encoding` (`encoding.Encoding`): how
   float32 becomes codes and scales, and what config.json says. With it the format has a word
   of `out_dtype:` if it has a method `encoding`, too (`WritableFormat`).

2. Add it to `FORMATS` in formats/registry.py.
3. Test it against the numbers of whoever made the format (`tests/support/quantised.py`), and add a
   row to docs/precision.md.

docs/formats.md says more. Sources are then read as numbers wherever they are opened: methods,
engine and plans see float32. Formats that cannot be read are refused by name, with what to do
instead (`ADVICE`).
"""
