"""Any source into a TFDS data set in array_record: the verb `jaxblip data prepare`."""
