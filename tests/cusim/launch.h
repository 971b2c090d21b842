// Included after a .cu file and the table of its kernels (sim.py makes it): what Python calls.
#pragma once

#include "guard.h"

namespace cusim {

constexpr size_t SHARED_ROOM = 48 << 10;  // bytes that a block has without asking for more

struct Shared {
    char* begin;
    size_t size;
};

static ptrdiff_t anchor_offset;  // of the anchor in the TLS block
static size_t shared_size;       // of the TLS block

CUSIM_SLOW int find_shared(dl_phdr_info* info, size_t, void*) {
    char* begin = static_cast<char*>(info->dlpi_tls_data);
    for (int i = 0; begin && i < info->dlpi_phnum; i++) {
        const auto& part = info->dlpi_phdr[i];
        if (part.p_type == PT_TLS && size_t(&cusim_shared_anchor - begin) < part.p_memsz) {
            anchor_offset = &cusim_shared_anchor - begin;
            shared_size = part.p_memsz;
        }
    }
    return 0;
}

// All __shared__ memory of this library: its TLS block, as this thread has it.
CUSIM_SLOW Shared all_shared() {
    *const_cast<volatile char*>(&cusim_shared_anchor) = 0;  // the block is made at first use
    if (!shared_size) dl_iterate_phdr(find_shared, nullptr);
    return {&cusim_shared_anchor - anchor_offset, shared_size};
}

// Nothing may rely on what shared memory holds at first: floats become NaN, integers -1.
CUSIM_SLOW void poison(Shared s, char* dynamic, size_t dynamic_size) {
    size_t first = dynamic ? dynamic - s.begin : s.size;
    memset(s.begin, 0xff, first);
    if (!dynamic) return;
    memset(dynamic, 0xff, dynamic_size);
    memset(dynamic + SHARED_ROOM, 0xff, s.size - first - SHARED_ROOM);
}

}  // namespace cusim

#define CUSIM_API \
    extern "C" __attribute__((visibility("default"), no_sanitize("thread", "undefined")))

// Name, bytes of arguments and threads of a block at most of kernel i; 0 if there is none.
CUSIM_API int cusim_kernel(unsigned i, const char** name, size_t* args, unsigned* threads) {
    if (i >= sizeof cusim_kernels / sizeof *cusim_kernels) return 0;
    *name = cusim_kernels[i].name;
    *args = cusim_kernels[i].args;
    *threads = cusim_kernels[i].threads;
    return 1;
}

// Bytes of all shared memory that is not dynamic, and where in it an address lies (negative: not).
CUSIM_API size_t cusim_static_shared() {
    return cusim::all_shared().size - 64 - (cusim_dynamic() ? cusim::SHARED_ROOM : 0);
}
CUSIM_API long cusim_shared_offset(uint64_t address) {
    cusim::Shared s = cusim::all_shared();
    uint64_t offset = address - uint64_t(s.begin);
    return offset < s.size ? long(offset) : -1;
}

// Run kernel i for at most so many seconds of processor time; 1 if that failed, and `fault` says
// how. Not for two threads at once.
CUSIM_API int cusim_launch(
    unsigned i, const unsigned* grid, const unsigned* size, const void* args, size_t dynamic_size,
    uint64_t seed, double seconds, cusim::Region* regions, unsigned n_regions, uint32_t* clock,
    cusim::Fault* fault) {
    using namespace cusim;
    if (!stacks) {
        stacks = static_cast<char*>(mmap(nullptr, MAX_THREADS * STACK_STEP, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (stacks == MAP_FAILED) return stacks = nullptr, 2;
    }
    kernel = cusim_kernels[i].run;
    kernel_args = args;
    cusim::fault = fault;
    fault->kind = FINE;
    block.grid = {grid[0], grid[1], grid[2]};
    block.size = {size[0], size[1], size[2]};
    block.threads = size[0] * size[1] * size[2];
    block.warps = (block.threads + LANES - 1) / LANES;
    unsigned blocks = grid[0] * grid[1] * grid[2];
    unsigned* turns = static_cast<unsigned*>(malloc(blocks * sizeof(unsigned)));
    if (!turns) return 2;
    order(turns, blocks, &seed);
    Shared shared = all_shared();
    char* dynamic = cusim_dynamic();
#ifdef CUSIM_CHECK
    begin_launch(regions, n_regions, *clock, shared.begin, shared.size, dynamic, dynamic_size);
#endif
    begin_guard(seconds);
    for (unsigned turn = 0; turn < blocks && fault->kind == FINE; turn++) {
        unsigned b = turns[turn];
        block.number = b;
        block.index = {b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]};
        poison(shared, dynamic, dynamic_size);
#ifdef CUSIM_CHECK
        begin_block();
#endif
        run_block(&seed);
    }
    end_guard();
#ifdef CUSIM_CHECK
    *clock = next_segment;
#endif
    current = nullptr;
    free(turns);
    return fault->kind != FINE;
}
