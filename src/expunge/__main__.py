from expunge.cli import main

main()
