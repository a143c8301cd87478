//! Functions that the verifier walks by themselves, once, and not again for each call and each state that a caller may be in.
//!
//! To the kernel these are the global ones: it knows nothing of their arguments but the types, and of their result but that it is a number
//! (pointers to memory: kernel 5.13, e5069b9c23b3). Everything else is walked anew from each of its callers, and in the loops over ports
//! once for each turn.

/// Makes of the generic function `$body`, which takes references to what it reads and to what it writes, and numbers, and
/// returns a number, one for each family; `$name` calls the right one. Each answers 0 to a pointer to nothing, which it never gets.
macro_rules! apart {
    ($(
        $(#[$attribute:meta])*
        $visibility:vis fn $name:ident [$v4:ident, $v6:ident] (
            reads $($read:ident: $read_type:ident),+;
            writes $($write:ident: $write_type:ident),*;
            $($number:ident: $number_type:ty),*
        ) -> $returned:ty = $body:ident;
    )+) => {$(
        $(#[$attribute])*
        #[inline(always)]
        $visibility fn $name<A: $crate::tc::packet::Header>(
            $($read: &$read_type<A>,)+
            $($write: &mut $write_type<A>,)*
            $($number: $number_type),*
        ) -> $returned {
            $(let $read = ::core::ptr::from_ref($read);)+
            $(let $write = ::core::ptr::from_mut($write);)*
            if A::VERSION == 4 {
                $v4($($read.cast(),)+ $($write.cast(),)* $($number),*)
            } else {
                $v6($($read.cast(),)+ $($write.cast(),)* $($number),*)
            }
        }

        $crate::apart::apart!(@ $v4, ::proxy_common::Ipv4Be, ($($read: $read_type),+), ($($write: $write_type),*), ($($number: $number_type),*), $returned, $body);
        $crate::apart::apart!(@ $v6, ::proxy_common::Ipv6Be, ($($read: $read_type),+), ($($write: $write_type),*), ($($number: $number_type),*), $returned, $body);
    )+};
    (
        @ $name:ident, $family:ty, ($($read:ident: $read_type:ident),+),
        ($($write:ident: $write_type:ident),*), ($($number:ident: $number_type:ty),*), $returned:ty, $body:ident
    ) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(
            $($read: *const $read_type<$family>,)+
            $($write: *mut $write_type<$family>,)*
            $($number: $number_type),*
        ) -> $returned {
            // SAFETY: made of references by the only caller; that they are not null the verifier has to see.
            $(let Some($read) = (unsafe { $read.as_ref() }) else { return 0 };)+
            // SAFETY: as above.
            $(let Some($write) = (unsafe { $write.as_mut() }) else { return 0 };)*
            $body::<$family>($($read,)+ $($write,)* $($number),*)
        }
    };
}

pub(crate) use apart;
