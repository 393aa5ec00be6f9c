from megatron_opsd.cli import main

if __name__ == "__main__":
    main()
