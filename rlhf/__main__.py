from rlhf.cli.main import main

main()
