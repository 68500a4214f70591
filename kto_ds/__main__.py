from kto_ds.cli import program

program()
