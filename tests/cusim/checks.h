// What check mode looks at before every access to memory: is it inside of something, has it been
// written, and is it ordered with what other threads did there?
//
// The compiler calls __tsan_* before every load and store (-fsanitize=thread; its runtime is not
// linked) and __ubsan_* where a pointer is misaligned, an index beyond its array, a sum too large.
//
// Two accesses to a byte by different threads, of which one writes and not both are atomic, must be
// ordered: by a __syncthreads, or, in one warp, by a __syncwarp of all lanes. Nothing else orders
// in a block: not shuffles and votes (as CUDA has it), not atomics or fences.
// Between blocks one thing orders: what comes before a __threadfence and then an atomic on a word
// of global memory comes before what follows a __threadfence after an atomic on the same word in a
// block that sees its value. (Blocks run one after the other: that is every later one. Fences are
// those of the threads that have the atomics; barriers put other threads before or behind them. An
// order by way of a third block is not seen.)
// Where kernels overlap (common.cuh, after_predecessors), a thread that has not waited for those
// before its own may touch nothing but memory that no kernel writes, to read it.
// To find every such pair it is enough to keep, of each byte, the last write, and of the reads and
// of the atomics two, of threads that are as far apart as possible (another block; else another
// warp; else another thread): whoever conflicts with any of them conflicts with one of these two,
// unless words order those.
#pragma once

#include <link.h>

#include "fibers.h"

namespace cusim {

enum Access { READ, WRITE, ATOMIC };

struct Touch {
    uint32_t segment;  // 0: none
    uint32_t place;    // of code, from the start of the library
};

struct Cell {  // of one byte
    Touch write, reads[2], atomics[2];
};

// Memory that kernels may use; sim.py has the same. Of a launch, in the order of addresses.
struct Region {
    uint64_t begin, size;
    uint8_t* written;  // of each byte
    Cell* cells;
    uint64_t is_constant;  // no kernel writes it
};

// A part of what a thread does, between two points where it waits for others, or fences.
struct Segment {
    uint32_t block, thread, barriers, syncs, fences;
};

// A word that a thread has changed by an atomic: after a fence, in `segment`, in a block that has
// ended or runs; or, in the block that runs, before one (0: which is still to come).
struct Word {
    uint64_t address;
    uint32_t thread, segment;
};

struct Words {
    Word* all;
    unsigned n, room;
};

static Region* regions;
static unsigned n_regions;
static Region *last_region, shared_region;
// Those of this launch. Numbers are not used again (the caller sees to that, over all libraries),
// so that what a cell holds of an earlier launch or block, which came before, is known to be old.
static Segment* segments;
static uint32_t segment_room, next_segment, first_of_launch, first_of_block;
static Words offered, taken;  // of the launch; of the block
static uint64_t image_begin, image_end;  // where this library lies, code and constants
static uint64_t dynamic_begin, dynamic_size, dynamic_room;

CUSIM const Segment& segment(uint32_t number) { return segments[number - first_of_launch]; }

CUSIM_SLOW uint32_t segment_of(Fiber* f) {
    unsigned syncs = f->warp->syncs;
    if (f->segment) {
        const Segment& s = segment(f->segment);
        if (s.barriers == block.barriers && s.syncs == syncs && s.fences == f->fences) {
            return f->segment;
        }
    }
    uint32_t n = next_segment - first_of_launch;
    if (n == segment_room) {
        segment_room = segment_room ? segment_room * 2 : 1 << 12;
        segments = static_cast<Segment*>(realloc(segments, segment_room * sizeof(Segment)));
        if (!segments) abort();
    }
    segments[n] = {block.number, f->number, block.barriers, syncs, f->fences};
    return f->segment = next_segment++;
}

// How far apart two things done are: 0 ordered, 1 threads of a warp, 2 warps, 3 blocks.
CUSIM int distance(const Segment& a, const Segment& b) {
    if (a.block != b.block) return 3;
    if (a.thread == b.thread || a.barriers != b.barriers) return 0;
    if (a.thread / LANES != b.thread / LANES) return 2;
    return a.syncs == b.syncs;
}

// Whether what a was comes before what b is, in one block; by the fences, if they are one thread's.
CUSIM bool is_before(const Segment& a, const Segment& b) {
    if (a.thread == b.thread) return a.fences < b.fences;
    const bool is_warp = a.thread / LANES == b.thread / LANES;
    return a.barriers < b.barriers || (is_warp && a.syncs < b.syncs);
}

CUSIM_SLOW void add_word(Words& words, Word word) {
    if (words.n == words.room) {
        words.room = words.room ? words.room * 2 : 64;
        words.all = static_cast<Word*>(realloc(words.all, words.room * sizeof(Word)));
        if (!words.all) abort();
    }
    words.all[words.n++] = word;
}

// The thread changes a word by an atomic, and sees what others did to it.
CUSIM_SLOW void meet_at(uint64_t address) {
    Fiber* f = current;
    for (unsigned i = 0; i < offered.n; i++) {
        if (offered.all[i].address != address) continue;
        add_word(taken, {address, f->number, 0});
        break;
    }
    if (f->fenced) add_word(offered, {address, f->number, f->fenced});
}

CUSIM_SLOW void fence() {
    Fiber* f = current;
    const uint32_t before = segment_of(f);
    for (unsigned i = 0; i < taken.n; i++) {
        Word& word = taken.all[i];
        if (word.thread == f->number && !word.segment) word.segment = before;
    }
    f->fences++;
    f->fenced = segment_of(f);
}

// Whether a word orders a, of a block that has ended, before b, of the one that runs.
CUSIM_SLOW bool by_word(const Segment& a, const Segment& b) {
    for (unsigned i = 0; i < taken.n; i++) {
        const Word& to = taken.all[i];
        if (!to.segment || !is_before(segment(to.segment), b)) continue;
        for (unsigned j = 0; j < offered.n; j++) {
            const Word& from = offered.all[j];
            if (from.address != to.address || segment(from.segment).block != a.block) continue;
            if (is_before(a, segment(from.segment))) return true;
        }
    }
    return false;
}

CUSIM void keep(Touch* two, Touch x, uint32_t oldest) {
    const Segment& s = segment(x.segment);
    for (int i = 0; i < 2; i++) {
        if (two[i].segment < oldest || distance(s, segment(two[i].segment)) == 0) {
            two[i] = x;
            // The other one may have become superfluous too; a second copy of x says the same.
            Touch& other = two[1 - i];
            if (other.segment < oldest || distance(s, segment(other.segment)) == 0) other = x;
            return;
        }
    }
    const Segment &a = segment(two[0].segment), &b = segment(two[1].segment);
    if (distance(s, a) > distance(b, a)) two[1] = x;
}

[[noreturn]] CUSIM_SLOW void fail_access(
    Kind kind, uint64_t address, unsigned size, Access access, uint64_t place) {
    Fault* f = new_fault(kind);
    f->address = address;
    f->size = size;
    f->write = access;
    f->place = place;
    leave();
}

CUSIM void check_order(
    uint64_t address, unsigned size, Access access, Touch x, Touch other, Access other_access,
    uint32_t oldest) {
    if (other.segment < oldest) return;
    const Segment& s = segment(other.segment);
    const int apart = distance(segment(x.segment), s);
    if (apart == 0 || (apart == 3 && by_word(s, segment(x.segment)))) return;
    Fault* f = new_fault(RACE);
    f->address = address;
    f->size = size;
    f->write = access;
    f->place = x.place;
    f->other_write = other_access;
    f->other_place = other.place;
    f->other_block = s.block;
    f->other_thread = s.thread;
    leave();
}

CUSIM_SLOW Region* find(uint64_t address) {
    if (last_region && address - last_region->begin < last_region->size) return last_region;
    unsigned low = 0, high = n_regions;
    while (low < high) {
        unsigned middle = (low + high) / 2;
        Region* r = &regions[middle];
        if (address - r->begin < r->size) return last_region = r;
        if (address < r->begin) high = middle;
        else low = middle + 1;
    }
    if (address - shared_region.begin < shared_region.size) return &shared_region;
    return nullptr;
}

CUSIM_SLOW void touch(const volatile void* pointer, unsigned size, Access access, void* code) {
    uint64_t address = uint64_t(pointer);
    Fiber* f = current;
    if (address - uint64_t(stack_of(f)) < STACK) return;
    uint64_t place = uint64_t(code) - image_begin;
    Region* r = find(address);
    if (!r) {
        if (access == READ && address - image_begin < image_end - image_begin) return;
        fail_access(BOUNDS, address, size, access, place);
    }
    uint64_t offset = address - r->begin;
    if (size > r->size - offset) fail_access(BOUNDS, address, size, access, place);
    uint64_t used = address + size - dynamic_begin;  // of dynamic shared memory
    if (used <= dynamic_room && used > dynamic_size && address >= dynamic_begin) {
        fail_access(BOUNDS, address, size, access, place);
    }
    if (!f->has_waited && r != &shared_region && (access != READ || !r->is_constant)) {
        fail_access(EARLY, address, size, access, place);
    }
    if (access == ATOMIC && r != &shared_region) meet_at(address);
    uint32_t oldest = r == &shared_region ? first_of_block : first_of_launch;
    Touch x = {segment_of(f), uint32_t(place)};
    for (unsigned i = 0; i < size; i++) {
        Cell& c = r->cells[offset + i];
        if (access != WRITE && !r->written[offset + i]) {
            fail_access(UNINITIALISED, address + i, size - i, access, place);
        }
        const bool is_again = c.reads[0].segment == x.segment || c.reads[1].segment == x.segment;
        if (access == READ && is_again) continue;
        const uint64_t at = address + i;
        const unsigned rest = size - i;
        check_order(at, rest, access, x, c.write, WRITE, oldest);
        for (int j = 0; j < 2; j++) {
            if (access != READ) check_order(at, rest, access, x, c.reads[j], READ, oldest);
            if (access != ATOMIC) check_order(at, rest, access, x, c.atomics[j], ATOMIC, oldest);
        }
        if (access == READ) keep(c.reads, x, oldest);
        if (access == ATOMIC) keep(c.atomics, x, oldest);
        if (access == WRITE) {
            c = {x, {}, {}};  // the others came before
            r->written[offset + i] = 1;
        }
    }
}

CUSIM_SLOW int find_image(dl_phdr_info* info, size_t, void*) {
    uint64_t here = uint64_t(&find_image), begin = ~0ull, end = 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto& part = info->dlpi_phdr[i];
        if (part.p_type != PT_LOAD) continue;
        uint64_t from = info->dlpi_addr + part.p_vaddr;
        if (from < begin) begin = from;
        if (from + part.p_memsz > end) end = from + part.p_memsz;
    }
    if (here < begin || here >= end) return 0;
    image_begin = info->dlpi_addr;
    image_end = end;
    return 1;
}

CUSIM_SLOW void begin_launch(
    Region* given, unsigned n, uint32_t first, char* shared, size_t shared_size, char* dynamic,
    size_t size) {
    regions = given;
    n_regions = n;
    last_region = nullptr;
    dynamic_begin = uint64_t(dynamic);
    dynamic_size = size;
    dynamic_room = dynamic ? 48 << 10 : 0;
    shared_region.begin = uint64_t(shared);
    if (!image_end) dl_iterate_phdr(find_image, nullptr);
    if (!shared_region.cells) {
        shared_region.size = shared_size;
        shared_region.cells = static_cast<Cell*>(calloc(shared_size, sizeof(Cell)));
        shared_region.written = static_cast<uint8_t*>(calloc(shared_size, 1));
        if (!shared_region.cells || !shared_region.written) abort();
    }
    first_of_launch = next_segment = first;
    offered.n = 0;
}

CUSIM_SLOW void begin_block() {
    first_of_block = next_segment;
    taken.n = 0;
    memset(shared_region.written, 0, shared_region.size);
}

// What the compiler says of a place in the source.
struct SourcePlace {
    const char* file;
    int line, column;
};

[[noreturn]] CUSIM_SLOW void fail_arithmetic(
    Kind kind, const SourcePlace* source, const char* what, void* code) {
    Fault* f = new_fault(kind);
    f->place = uint64_t(code) - image_begin;
    f->line = source->line;
    snprintf(f->text, sizeof f->text, "%s", what);
    leave();
}

}  // namespace cusim

#define CUSIM_HOOK                                                             \
    extern "C" __attribute__((noinline, used, no_sanitize("thread", "undefined"), \
                              visibility("hidden"))) void
#define CUSIM_ACCESS(name, size, access) \
    CUSIM_HOOK __tsan_##name(void* p) { cusim::touch(p, size, cusim::access, CUSIM_CALLER); }
#define CUSIM_ACCESSES(size)               \
    CUSIM_ACCESS(read##size, size, READ)   \
    CUSIM_ACCESS(write##size, size, WRITE) \
    CUSIM_ACCESS(unaligned_read##size, size, READ) \
    CUSIM_ACCESS(unaligned_write##size, size, WRITE)
CUSIM_ACCESSES(1)
CUSIM_ACCESSES(2)
CUSIM_ACCESSES(4)
CUSIM_ACCESSES(8)
CUSIM_ACCESSES(16)
CUSIM_HOOK __tsan_read_range(void* p, size_t n) {
    cusim::touch(p, n, cusim::READ, CUSIM_CALLER);
}
CUSIM_HOOK __tsan_write_range(void* p, size_t n) {
    cusim::touch(p, n, cusim::WRITE, CUSIM_CALLER);
}
CUSIM_HOOK __tsan_init() {}

namespace cusim {
struct Mismatch {
    SourcePlace source;
    const void* type;
    uint8_t log_alignment, doing;  // 0 a read, 1 a write
};
}
CUSIM_HOOK __ubsan_handle_type_mismatch_v1(cusim::Mismatch* mismatch, uint64_t address) {
    cusim::fail_access(cusim::MISALIGNED, address, 1 << mismatch->log_alignment,
                       mismatch->doing == 1 ? cusim::WRITE : cusim::READ,
                       uint64_t(CUSIM_CALLER) - cusim::image_begin);
}
#define CUSIM_UBSAN(name, what)                                                   \
    CUSIM_HOOK __ubsan_handle_##name(cusim::SourcePlace* source) {                \
        cusim::fail_arithmetic(cusim::ARITHMETIC, source, what, CUSIM_CALLER);    \
    }
CUSIM_UBSAN(add_overflow, "a sum does not fit its type")
CUSIM_UBSAN(sub_overflow, "a difference does not fit its type")
CUSIM_UBSAN(mul_overflow, "a product does not fit its type")
CUSIM_UBSAN(negate_overflow, "a negated value does not fit its type")
CUSIM_UBSAN(divrem_overflow, "division by zero, or a quotient that does not fit its type")
CUSIM_UBSAN(shift_out_of_bounds, "a shift by more bits than there are")
CUSIM_HOOK __ubsan_handle_out_of_bounds(cusim::SourcePlace* source) {
    cusim::fail_arithmetic(cusim::BOUNDS, source, "an index is beyond its array", CUSIM_CALLER);
}
