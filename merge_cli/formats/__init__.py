"""Storage formats, one file each: how quantised weights are recognised, read and written.

To add a format:

1. Write `formats/NAME.py` with a class like `fp8.Fp8` (the protocol is `StorageFormat`):

       detect     does this model use the format? From headers and config.json alone.
       decode     name -> tensor, each a `checkpoint.tensors.Tensor` that computes float32 from the
                  stored codes while it is read (as `fp8.DequantizedTensor` does)
       encode     float32 rows -> codes and scales, for writing
       settings   what config.json says of an output in this format

2. Add it to `FORMATS` in formats/detect.py.

Sources are then read as numbers wherever they are opened: methods, engine and plans see float32.
Formats that cannot be read are refused by name, with what to do instead (`ADVICE`).
"""
